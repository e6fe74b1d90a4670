"""An open artifact: its manifest, the reader that turns arguments into arrays, and the sessions of its graphs."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from bonnx.errors import ArtifactError, InputError, ProviderError

from ..artifact.folder import WEIGHTS, locate, read_verified
from ..artifact.manifest import Manifest
from ..checks import check_path, check_whole
from ..text.chat import ChatTemplate
from ..text.compose import Composer
from ..text.pair import PairTemplate
from ..text.reader import Reader
from ..text.tokenizer import Tokenizer
from .placement import CAPTURED, CPU_ONLY
from .prompt_cache import PromptCache
from .session import Provider, Session, SessionOptions

__all__ = ["PROMPT_CACHE", "Engine", "SessionPool", "make_engine", "open_engine"]

# Bytes of prompts that are kept by default.
PROMPT_CACHE = 512 * 2**20


class SessionPool:
    """The sessions of an artifact's graphs, each created on first use. Safe to share between threads."""

    def __init__(self, folder: Path, manifest: Manifest, options: SessionOptions) -> None:
        self._folder, self._manifest, self._options = folder, manifest, options
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str) -> Session:
        """The session of one graph.

        Raises:
            ArtifactError: the artifact has no such graph, or ONNX Runtime cannot load it.
        """
        with self._lock:
            if name not in self._sessions:
                graph = self._manifest.graphs.get(name)
                if graph is None:
                    raise ArtifactError(
                        f"{self._folder} has no graph '{name}', only {', '.join(sorted(self._manifest.graphs))}; "
                        "export the model again without --single-file, or with a bonnx that writes it"
                    )
                path, options = locate(self._folder, graph.file), self._options
                if name in CPU_ONLY:
                    options = msgspec.structs.replace(options, provider="cpu")
                key = self._key(graph.file)
                self._sessions[name] = Session(path, graph, options, key, captured=name in CAPTURED)
            return self._sessions[name]

    def _key(self, file: str) -> str:
        """Identify the contents of a graph's file and of the weights beside it."""
        files = self._manifest.files
        names = [file, f"{file.rpartition('/')[0]}/{WEIGHTS}"]
        digests = [files[name].sha256 for name in names if name in files]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32]

    def close(self) -> None:
        """Free the memory of the loaded graphs; a graph is loaded again when it is next used."""
        with self._lock:
            self._sessions.clear()


class Engine:
    """An open artifact, as rank, generate, search, serve and batch need it.

    Safe to share between threads.

    Attributes:
        manifest: of the artifact.
        reader: turns prompts and candidates into arrays.
        session: gives the session of a graph by its name.
        provider: where the graphs run, `cpu` or `cuda`.
        memory_limit: bytes that one run may take, or None.
        prompts: the prompts that were read ahead.
        static_cache: whether `decode_static` runs in place of `decode` where it can.
    """

    def __init__(
        self,
        manifest: Manifest,
        reader: Reader,
        session: Callable[[str], Session],
        *,
        provider: str = "cpu",
        memory_limit: int | None = None,
        prompt_cache: int = PROMPT_CACHE,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.manifest, self.reader, self.session = manifest, reader, session
        self.provider, self.memory_limit, self._close = provider, memory_limit, close
        self.prompts = PromptCache(manifest, session, prompt_cache)
        # On a CPU nothing is captured, and caches that grow are read no further than they are full.
        self.static_cache = provider == "cuda" and "decode_static" in manifest.graphs

    def close(self) -> None:
        """Free the memory of the loaded graphs and of prompts; a graph is loaded again when it is next used."""
        self.prompts.clear()
        self._close()

    def check_scorer(self, what: str, otherwise: str = "") -> None:
        """Refuse what needs a scorer, if the artifact has none.

        Args:
            what: needs it.
            otherwise: what the caller can do instead.

        Raises:
            InputError: the artifact only generates.
        """
        if not self.manifest.has_scorer:
            raise InputError(
                f"{what} needs a scorer, and '{self.manifest.name}' was exported with --no-scorer; "
                f"{otherwise and otherwise + ', or '}train a scorer (docs/scorer.md) and export without that option"
            )

    @property
    def input_suffix(self) -> str:
        """How the names of the graphs' inputs end: `ids` or `embeds`."""
        return "ids" if self.manifest.kind == "language_model" else "embeds"

    @property
    def joint_limit(self) -> int:
        """The longest row, in tokens, that may run beside others.

        Dynamic and longrope scaling go by the longest row of a run that is longer than this: such rows run by
        themselves.
        """
        scaling = self.manifest.network.get("rope_scaling")
        if isinstance(scaling, dict) and scaling.get("kind") in ("dynamic", "longrope"):
            return int(scaling["original_max_positions"])
        return self.manifest.limits.max_tokens

    @property
    def changes_at_limit(self) -> bool:
        """Whether all rows beyond `joint_limit` rotate alike, but not as the shorter ones do (longrope)."""
        scaling = self.manifest.network.get("rope_scaling")
        return isinstance(scaling, dict) and scaling.get("kind") == "longrope"


def open_engine(
    path: str | os.PathLike[str],
    *,
    provider: Provider = "auto",
    threads: int | None = None,
    device_id: int = 0,
    memory_limit: int | None = None,
    prompt_cache: int = PROMPT_CACHE,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Engine:
    """Open an artifact: see `bonnx.load`, whose arguments and errors these are."""
    options = SessionOptions(
        provider=provider,
        threads=threads,
        device_id=device_id,
        memory_limit=memory_limit,
        cache_dir=None if cache_dir is None else str(check_path("cache_dir", cache_dir)),
    )
    check_whole("prompt_cache", prompt_cache, 0)
    folder = check_path("path", path)
    manifest = read_verified(folder)
    return make_engine(folder, manifest, options, prompt_cache)


def make_engine(folder: Path, manifest: Manifest, options: SessionOptions, prompt_cache: int = PROMPT_CACHE) -> Engine:
    """The engine of a folder whose manifest has been read."""
    sessions, reader = SessionPool(folder, manifest, _fitting(manifest, options)), _reader(folder, manifest)
    # One graph is loaded now, so that an unavailable provider is reported at once.
    provider, limit = sessions("rank" if "rank" in manifest.graphs else "generate").provider, options.memory_limit
    return Engine(
        manifest,
        reader,
        sessions,
        provider=provider,
        memory_limit=limit,
        prompt_cache=prompt_cache,
        close=sessions.close,
    )


def _fitting(manifest: Manifest, options: SessionOptions) -> SessionOptions:
    """Refuse CUDA for an artifact with 8-bit products; `auto` chooses the CPU for it."""
    if manifest.precision not in ("int8", "int4") or options.provider == "cpu":
        return options
    if options.provider == "cuda":
        raise ProviderError(
            f"provider='cuda' was requested, but '{manifest.name}' is {manifest.precision}, and ONNX Runtime "
            "has no CUDA kernel for its 8-bit products: each would run on the CPU, with copies to and fro; export the "
            "model at fp16 or fp32 for CUDA, or use provider='cpu'"
        )
    return msgspec.structs.replace(options, provider="cpu")


def _reader(folder: Path, manifest: Manifest) -> Reader:
    rules, tokenizer, chat = manifest.text, None, None
    if manifest.tokenizer is not None:
        tokenizer = Tokenizer(locate(folder, manifest.tokenizer), manifest.scoring, rules)
    if rules.chat_template is not None:
        source = locate(folder, rules.chat_template).read_bytes().decode()
        chat = ChatTemplate(source, rules.template_tokens)
    pair = None
    if rules.pair is not None:
        source = locate(folder, rules.pair.template).read_bytes().decode()
        pair = PairTemplate(source, rules.template_tokens, rules.pair)
    return Reader(manifest, tokenizer, Composer(rules, chat, pair))
