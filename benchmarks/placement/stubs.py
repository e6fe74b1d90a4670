"""Empty CUDA libraries, on which ONNX Runtime's CUDA provider loads without a GPU. It can place nodes, not run them.

The functions that answer questions about a device describe one of compute capability 9.0; memory is the host's; every
other function does nothing and succeeds.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

_FUNCTIONS = r"""
#include <stdlib.h>
#include <string.h>
typedef void *P;
static int handle(P *p) { *p = calloc(1, 4096); return 0; }
static int host(P *p, size_t n) { *p = aligned_alloc(256, (n + 511) / 256 * 256); return *p ? 0 : 2; }
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *n) { *n = 0; return 0; }
int cudaDeviceGetAttribute(int *v, int a, int d) {
  /* multiprocessors, shared memory, warp, threads, capability */
  *v = a == 16 ? 132 : a == 8 ? 49152 : a == 97 ? 232448 : a == 10 ? 32 : a == 39 ? 2048 : a == 1 ? 1024
     : a == 75 ? 9 : a == 76 ? 0 : 1;
  return 0;
}
int cudaGetDeviceProperties(char *p, int d) {
  /* Up to the fields that are read: name 0, memory 288, shared 296, registers 304, warp 308, threads 320, ... */
  int *at = (int *)(p + 300);
  memset(p, 0, 900);
  strcpy(p, "no device");
  *(size_t *)(p + 288) = 80ull << 30;
  *(size_t *)(p + 296) = 49152;
  at[1] = 65536; at[2] = 32; at[5] = 1024;
  for (int i = 0; i < 3; i++) { at[6 + i] = 1024; at[9 + i] = 65535; }
  at[15] = 9; at[16] = 0; at[21] = 132;
  return 0;
}
int cudaMemGetInfo(size_t *f, size_t *t) { *f = 70ull << 30; *t = 80ull << 30; return 0; }
int cudaMalloc(P *p, size_t n) { return host(p, n); }
int cudaMallocHost(P *p, size_t n) { return host(p, n); }
int cudaMallocAsync(P *p, size_t n, P s) { return host(p, n); }
int cudaMallocFromPoolAsync(P *p, size_t n, P q, P s) { return host(p, n); }
int cudaHostAlloc(P *p, size_t n, unsigned f) { return host(p, n); }
int cudaFree(P p) { free(p); return 0; }
int cudaFreeAsync(P p, P s) { free(p); return 0; }
int cudaFreeHost(P p) { free(p); return 0; }
int cudaMemcpy(P d, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }
int cudaMemcpyAsync(P d, const void *s, size_t n, int k, P t) { memcpy(d, s, n); return 0; }
int cudaMemset(P d, int v, size_t n) { memset(d, v, n); return 0; }
int cudaMemsetAsync(P d, int v, size_t n, P t) { memset(d, v, n); return 0; }
const char *cudaGetErrorString(int e) { return "no device"; }
const char *cudaGetErrorName(int e) { return "no device"; }
int cudaRuntimeGetVersion(int *v) { *v = MAJOR * 1000; return 0; }
int cudaDriverGetVersion(int *v) { *v = MAJOR * 1000; return 0; }
int cudaPointerGetAttributes(int *a, const void *p) { memset(a, 0, 64); a[0] = 2; return 0; }
int cudaStreamIsCapturing(P s, int *c) { *c = 0; return 0; }
int cudaStreamEndCapture(P s, P *graph) { return handle(graph); }
int cudaGraphInstantiate(P *run, P graph, unsigned long long flags) { return handle(run); }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, P f, int b, size_t d) { *n = 1; return 0; }
int cudaStreamCreate(P *p) { return handle(p); }
int cudaStreamCreateWithFlags(P *p, unsigned f) { return handle(p); }
int cudaStreamCreateWithPriority(P *p, unsigned f, int i) { return handle(p); }
int cudaEventCreate(P *p) { return handle(p); }
int cudaEventCreateWithFlags(P *p, unsigned f) { return handle(p); }
int cudaDeviceGetDefaultMemPool(P *p, int d) { return handle(p); }
int cudaMemPoolCreate(P *p, P o) { return handle(p); }
int cublasCreate_v2(P *p) { return handle(p); }
int cublasLtCreate(P *p) { return handle(p); }
int cudnnCreate(P *p) { return handle(p); }
int cublasGetVersion_v2(P h, int *v) { *v = MAJOR * 10000; return 0; }
size_t cublasLtGetVersion(void) { return MAJOR * 10000; }
int cublasGetMathMode(P h, int *v) { *v = 0; return 0; }
int cublasGetStream_v2(P h, P *v) { *v = 0; return 0; }
P *__cudaRegisterFatBinary(P f) { P p; handle(&p); return (P *)p; }
"""
# What every Linux has, and what the wheel has itself.
_OURS = re.compile(r"lib(cu|nv)")


def make_stubs(wheel: Path, folder: Path) -> Path:
    """Make the libraries that an unpacked onnxruntime-gpu wheel needs; return their folder, for `LD_LIBRARY_PATH`.

    Needs `gcc` and binutils. Every library gets every missing function, because a program finds them by the library's
    name and version only.
    """
    needed, missing = set[str](), set[str]()
    for provider in (wheel / "onnxruntime" / "capi").glob("libonnxruntime_providers_*.so"):
        needed |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "-d", str(provider))))
        symbols = _output("nm", "-D", "--undefined-only", str(provider))
        missing |= {name for name, _, library in re.findall(r" U (\w+)(@(\S+))?", symbols) if not _of_host(library)}
        # Those of cuDNN are looked up by their names when they are first called.
        missing |= {name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", provider.read_bytes())}
    folder.mkdir(parents=True, exist_ok=True)
    for library in filter(_OURS.match, needed):
        version = re.search(r"\.so\.(\d+)", library)
        source, script = folder / "stub.c", folder / "stub.map"
        written = set(re.findall(r"(\w+)\(", _FUNCTIONS))
        rest = "\n".join(
            f"int {name}(void) {{ return 0; }}" for name in sorted(missing - written - {"Provider_GetHost"})
        )
        source.write_text(f"#define MAJOR {_major(needed)}\n{_FUNCTIONS}\n{rest}\n")
        script.write_text(f"{library} {{ global: *; }};\n")
        command = ["gcc", "-w", "-shared", "-fPIC", "-o", str(folder / library), str(source), f"-Wl,-soname,{library}"]
        # Only these have versions of symbols.
        versioned = version is not None and library.startswith(("libcublas", "libcudart", "libcudnn"))
        subprocess.run([*command, *([f"-Wl,--version-script={script}"] if versioned else [])], check=True)
    return folder


def environment(wheel: Path, stubs: Path) -> dict[str, str]:
    """The environment of a Python process that imports the wheel on the stubs."""
    return {**os.environ, "LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": str(wheel)}


def _major(libraries: set[str]) -> int:
    """The version of CUDA that the wheel needs."""
    (major,) = (int(match[1]) for name in libraries if (match := re.match(r"libcudart\.so\.(\d+)", name)))
    return major


def _of_host(library: str) -> bool:
    return library.startswith(("GLIBC", "GCC", "CXXABI"))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
