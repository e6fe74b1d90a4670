"""Checkpoints by hub id, against a small hub of our own on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from bonnx.models import ConfigError, load_checkpoint
from bonnx.models.hub import HubSource, parse_source
from tests.models.local_hub import REPO, serve
from tests.test_packaging import run_without
from tests.tolerance import RUNTIME, within


@pytest.fixture
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture
def fetch(hub, tmp_path):
    """Download as a program of its own does, which reads the environment anew: (folder, commit), or a ConfigError."""
    code = """
import json, sys
from bonnx.models.config import ConfigError
from bonnx.models.hub import HubSource, download, parse_source
try:
    source, (adapter, commit) = parse_source(sys.argv[1]), json.loads(sys.argv[2])
    if isinstance(source, HubSource):
        folder, sha = download(source, adapter)
        print(json.dumps([str(folder), sha]))
        assert "torch" not in sys.modules
    else:
        import torch
        from bonnx.models.checkpoint import load_checkpoint
        from bonnx.models.opened import open_checkpoint
        opened = open_checkpoint(source, adapter=adapter, source=commit)
        scores = load_checkpoint(opened)[0](torch.arange(1, 9)[None])[1][0, -1]
        print(json.dumps([str(opened.path), opened.source, scores.tolist()]))
except ConfigError as e:
    assert e.__cause__ is not None or any(word in str(e) for word in ("pickle", "found", "adapter"))
    print(json.dumps(str(e)))
"""

    def run(text=REPO, adapter=None, source=None, **environment):
        clean = {k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "HUGGING"))}
        clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        done = subprocess.run(
            [sys.executable, "-c", code, text, json.dumps([adapter, source])],
            env=clean | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        printed = json.loads(done.stdout)
        if isinstance(printed, str):
            raise ConfigError(printed)
        return printed if source else (Path(printed[0]), printed[1])

    return run


@pytest.fixture
def reward_model(rng):
    """A tiny Llama reward model with fresh weights."""
    torch.manual_seed(int(rng.integers(2**31)))
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.5,
    )
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture(params=["one file", "shards"])
def saved(reward_model, request, tmp_path):
    reward_model.save_pretrained(tmp_path / "saved", max_shard_size="8KB" if request.param == "shards" else "1GB")
    files = read(tmp_path / "saved")
    assert ("model.safetensors.index.json" in files) == (request.param == "shards")
    return files


def read(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FAKE = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}
# Contents differ: the cache asks for equal ones once.
TEXT = {
    name: f"content of {name}".encode()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_LogitScore/config.json",
    )
}
USELESS = {
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "state.pkl": b"pickle",
    "modeling_tiny.py": b"code",
    "additional_chat_templates/code.py": b"code",
    "original/consolidated.00.pth": b"pickle",
    "consolidated.safetensors": b"twice",
    "checkpoint-5/model.safetensors": b"older",
    "checkpoint-5/config.json": b"{}",
    "README.md": b"words",
}


def test_a_download_is_the_checkpoint_and_nothing_that_can_run(hub, fetch, saved, reward_model, rng):
    sha = hub.push(saved | TEXT | USELESS)
    folder, commit = fetch()
    assert commit == sha
    assert read(folder) == saved | TEXT
    assert sorted(hub.asked) == sorted(saved | TEXT)
    model, _ = load_checkpoint(folder)
    ids = torch.from_numpy(rng.integers(1, 60, (1, 9)))
    with torch.no_grad():
        assert within(model(ids)[1][0, -1], reward_model(ids).logits[0], RUNTIME)


def test_a_branch_that_moves_gives_two_commits_and_each_keeps_its_files(hub, fetch):
    first = hub.push(FAKE | {"config.json": b'{"first": 1}'})
    one = fetch(f"{REPO}@main")
    second = hub.push(FAKE | {"config.json": b'{"second": 2}'})
    side = hub.push(FAKE | {"config.json": b'{"side": 3}'}, branch="side")
    two, three, again = fetch(f"{REPO}@main"), fetch(f"{REPO}@side"), fetch(f"{REPO}@{first}")
    assert [one[1], two[1], three[1], again[1]] == [first, second, side, first]
    assert [(folder / "config.json").read_bytes() for folder, _ in (one, two, three, again)] == [
        b'{"first": 1}',
        b'{"second": 2}',
        b'{"side": 3}',
        b'{"first": 1}',
    ]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pkl"])
def test_a_repository_of_pickles_is_refused(hub, fetch, name):
    hub.push({"config.json": b"{}", name: b"pickle", "checkpoint-5/model.safetensors": b"older"})
    with pytest.raises(ConfigError, match=rf"only {name}: a pickle, .*{REPO}@refs/pr/N .*weights_only=True"):
        fetch()
    assert hub.asked == ["config.json"]


def test_the_hub_s_own_safetensors_are_at_the_revision_that_the_refusal_names(hub, fetch):
    hub.push({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    sha = hub.push(FAKE, branch="refs/pr/7")
    assert fetch(f"{REPO}@refs/pr/7")[1] == sha


def test_a_repository_without_weights_says_what_it_holds(hub, fetch):
    hub.push({"config.json": b"{}", "other.safetensors": b"weights"})
    with pytest.raises(ConfigError, match=r"expected model\.safetensors in it; found config\.json, other\.safetensors"):
        fetch()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("adapter", [None, "other"])
def test_an_adapter_is_downloaded_with_the_base_model_that_it_names(hub, fetch, saved, reward_model, tmp_path, adapter):
    """At the revision that it was trained on."""
    commit = hub.push(saved, branch="base")
    hub.push(FAKE)
    options = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["q_proj"], "inference_mode": False}
    reward_model.name_or_path = REPO
    trained = peft.get_peft_model(reward_model, peft.LoraConfig(**options), revision="base")
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    files = {
        f"{adapter}/{name}" if adapter else name: (tmp_path / "adapter" / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    main = hub.push({**files, "adapter_model.bin": b"pickle"}, branch="adapter")
    if adapter:
        with pytest.raises(ConfigError, match="contains adapters in subfolders; choose one with --adapter: other"):
            fetch(f"{REPO}@adapter")
    folder, sha = fetch(f"{REPO}@adapter", adapter=adapter)
    assert sha == main
    place, source, scores = fetch(str(folder), adapter=adapter, source=f"{REPO}@{sha}")
    assert source == f"{REPO}@{main} on {REPO}@{commit}"
    assert place == str(folder / (adapter or ""))
    with torch.no_grad():
        assert within(scores, trained(torch.arange(1, 9)[None]).logits[0], RUNTIME)
    assert "adapter_model.bin" not in hub.asked


def test_a_gguf_file_is_downloaded_with_its_tokenizer_alone(hub, fetch):
    files = {f"q/m-0000{i}-of-00002.gguf": b"GGUF%d" % i for i in (1, 2)} | {"q/tokenizer.json": b"{}"}
    sha = hub.push(files | FAKE | {"q/other.gguf": b"GGUF", "tokenizer.json": b"{}", "q/code.py": b"code"})
    path, commit = fetch(f"{REPO}:q/m-00001-of-00002.gguf")
    assert (path.name, commit) == ("m-00001-of-00002.gguf", sha)
    assert sorted(hub.asked) == sorted(files)
    with pytest.raises(ConfigError, match=rf"found 3 GGUF files; pass .*, such as {REPO}:q/m-00001-of"):
        fetch(f"{REPO}:q/none.gguf")
    hub.push({"config.json": b"{}", "m.gguf": b"GGUF"})
    with pytest.raises(ConfigError, match=rf"found 1 GGUF files; pass .*, such as {REPO}:m\.gguf"):
        fetch()


def test_what_is_not_there_is_told_apart(hub, fetch):
    hub.push(FAKE)
    with pytest.raises(ConfigError, match=r"checkpoint org/other: no folder has this name, and http.* no such repo"):
        fetch("org/other")
    with pytest.raises(ConfigError, match=rf"checkpoint {REPO}@nowhere: .* no such revision; expected a branch"):
        fetch(f"{REPO}@nowhere")
    with pytest.raises(ConfigError, match=r"checkpoint org/a--b: the download failed \(HFValidationError"):
        fetch("org/a--b")


def test_a_gated_repository_needs_its_token(hub, fetch):
    sha = hub.push(FAKE)
    hub.token = "hf_secret"
    for environment in ({}, {"HF_TOKEN": "hf_other"}):
        with pytest.raises(ConfigError, match=r"gated; accept its terms.*HF_TOKEN") as error:
            fetch(**environment)
        assert "hf_other" not in str(error.value)
    assert fetch(HF_TOKEN="hf_secret")[1] == sha


def test_offline_the_cache_is_taken_or_missed(hub, fetch):
    hub.push(FAKE)
    with pytest.raises(ConfigError, match=r"cannot be reached, and the cache does not contain.*HF_HUB_OFFLINE"):
        fetch(HF_HUB_OFFLINE="1")
    assert not hub.asked
    online = fetch()
    hub.push(FAKE | {"config.json": b'{"newer": 1}'})
    assert fetch(HF_HUB_OFFLINE="1") == online
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert fetch(**nobody) == online
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        fetch("org/other", **nobody)


def test_a_connection_cut_in_a_file_leaves_nothing_that_looks_complete(hub, fetch, rng, tmp_path):
    content = rng.bytes(int(rng.integers(50_000, 500_000)))
    sha = hub.push(FAKE | {"model.safetensors": content})
    hub.cut = "model.safetensors"
    with pytest.raises(ConfigError, match=r"the download failed.*try again"):
        fetch()
    assert hub.asked.count("model.safetensors") == 1
    assert not list((tmp_path / "home").rglob("model.safetensors"))
    # What is half there is not taken for whole without the hub either.
    with pytest.raises(ConfigError, match="the cache does not contain the complete checkpoint"):
        fetch(HF_HUB_OFFLINE="1")
    hub.cut = None
    folder, commit = fetch()
    assert commit == sha
    assert (folder / "model.safetensors").read_bytes() == content


def test_without_huggingface_hub_the_error_says_what_to_install():
    code = """
import bonnx.models
from bonnx.models.hub import download, parse_source
download(parse_source("org/name"))
"""
    done = run_without({"huggingface_hub", "torch"}, code)
    assert "ConfigError: checkpoint org/name: huggingface_hub is not installed; run `pip install bonnx[hub]`" in (
        done.stderr
    )


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("Qwen/Qwen2.5-Math-PRM-7B", "Qwen/Qwen2.5-Math-PRM-7B", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("o_r-g/n_a-m.e@" + "0a" * 20, "o_r-g/n_a-m.e", "0a" * 20),
    ],
)
def test_hub_ids(text, repo, revision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = parse_source(text)
    assert source == HubSource(repo, revision)
    assert str(source) == text


def test_gguf_files_of_hub_ids():
    for text, source in (
        ("org/name:m.gguf", HubSource("org/name", None, "m.gguf")),
        ("org/name@v1:q4/m-Q4_K_M.gguf", HubSource("org/name", "v1", "q4/m-Q4_K_M.gguf")),
    ):
        assert parse_source(text) == source
        assert str(source) == text
    for text in ("org/name:../m.gguf", "org/name:m.bin", "org/name:/m.gguf"):
        with pytest.raises(ConfigError, match="is neither an existing folder nor an id"):
            parse_source(text)


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("org/name", "org/name@v1", "plain", str(tmp_path / "absolute")):
        Path(text).mkdir(parents=True)
        assert parse_source(text) == Path(text)
    Path("org/file").touch()
    with pytest.raises(ConfigError, match="'org/file' is a file; expected a folder"):
        parse_source("org/file")


@pytest.mark.parametrize(
    "text",
    [
        *("", "name", "a/b/c", "/org/name", "./org/name", "../name", "~/name", "-o/name", "org/", "/name"),
        *("org/na me", "org/name\n", "org/n\0me", "org/näme", "https://example.org/org/name", "x" * 5000),
        *("org/name@", "org/name@a b", "org/name@../../x", "org/name@x/../y", "org/name@-x"),
    ],
)
def test_other_texts_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a folder with config\.json, or an id on the hub such as org/name"):
        parse_source(text)
