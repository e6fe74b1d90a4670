"""Export a checkpoint in this process, which is faster than the command."""

import bonnx
from bonnx.export.artifact import export_model
from bonnx.export.checkpoint.source import Overrides, read_checkpoint


def export(folder, overrides=None, *, no_scorer=False, verification="full"):
    """Write the artifact of `folder / "checkpoint"` to `folder / "out"`, which is returned."""
    source = read_checkpoint(folder / "checkpoint", overrides or Overrides(), no_scorer=no_scorer)
    export_model(
        source.model,
        folder / "out",
        name="model",
        scoring=source.scoring,
        limits=source.limits,
        tokenizer=source.tokenizer,
        text=source.text,
        reload=source.reload,
        verification=verification,
    )
    return folder / "out"


def exported(folder, overrides):
    """The same, loaded."""
    return bonnx.load(export(folder, overrides))
