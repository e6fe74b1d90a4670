"""Export a checkpoint in this process, which is faster than the command."""

import bonnx
from bonnx.export.artifact import export_model
from bonnx.export.checkpoint.source import read_checkpoint


def exported(folder, overrides):
    """The artifact of `folder / "checkpoint"`, written to `folder / "out"` and loaded."""
    source = read_checkpoint(folder / "checkpoint", overrides)
    export_model(
        source.model,
        folder / "out",
        name="model",
        scoring=source.scoring,
        limits=source.limits,
        tokenizer=source.tokenizer,
        text=source.text,
        reload=source.reload,
    )
    return bonnx.load(folder / "out")
