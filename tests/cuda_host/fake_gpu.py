"""fusedopt on a fake GPU: the whole extension module with its .cu files run on the CPU.

torch's CPU memory counts as the memory of GPUs.

    fake_gpu.install()             before fusedopt is imported; CUDA_HOST_DEVICES: how many GPUs
    with fake_gpu.on_host(): ...   torch's memory is the CPU's again, in the same process

Python still sees CPU tensors: only the module is told another device. So code that asks a tensor
for its device must get along with either; what torch does on a GPU is for tests marked `gpu`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cuda_host import build as shim

HOST = -1
EXCHANGE = "__dlpack_c_exchange_api__"
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
ISAS = {  # as in CMakeLists.txt
    "portable": ["-DFUSEDOPT_PACK_BYTES=16"],
    "avx2": ["-DFUSEDOPT_PACK_BYTES=32", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-DFUSEDOPT_PACK_BYTES=64", *AVX512],
    "avx512_bf16": ["-DFUSEDOPT_PACK_BYTES=64", *AVX512, "-mavx512bf16"],
}
# Instruction sets that only some files of csrc/cpu are compiled for.
PARTIAL = {"avx512_bf16": ("newton_schulz",)}
# Files of csrc/cpu that are compiled once.
WHOLE = ("isa", "launch", "muon_launch", "newton_schulz_launch", "threads")

library: Any = None


def build_module(sanitize: str | None = None) -> Path:
    """The extension module as a shared library, with a fake GPU in it."""
    import pybind11

    version = importlib.metadata.version("fusedopt")
    defines = {
        "VERSION": f'"{version}"',
        "WITH_CUDA": "1",
        "CUDA_ARCHS": '"80-real 86-real 89-real 90-real 100-real 120"',
        "CUDA_DECISION": '"on: run on the CPU by tests/cuda_host"',
    }
    flags = [f"-DFUSEDOPT_{name}={value}" for name, value in defines.items()]
    flags += [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    binding = [*shim.CSRC.glob("binding/*.cpp"), shim.HERE / "gpu/exchange.cpp"]
    cpu = sorted(shim.CSRC.glob("cpu/*.cpp"))
    sources: list[shim.Source] = [*sorted(shim.CSRC.glob("cuda/**/*.cu"))]
    sources += [(path, ["-fvisibility=hidden"]) for path in sorted(binding)]
    sources += [(path, ["-fvisibility=hidden"]) for path in cpu if path.stem in WHOLE]
    for isa, own in ISAS.items():
        own = [f"-DFUSEDOPT_TARGET={isa}", "-fvisibility=hidden", "-Wno-maybe-uninitialized", *own]
        each = [path for path in cpu if path.stem not in WHOLE]
        sources += [(path, own) for path in each if path.stem in PARTIAL.get(isa, (path.stem,))]
    return shim.build(sources, sanitize=sanitize, flags=flags)


def install(sanitize: str | None = None) -> None:
    """Puts the module in the place of ``fusedopt._C``, and its exchange in the place of torch's."""
    global library
    import torch

    path = build_module(sanitize)
    loader = importlib.machinery.ExtensionFileLoader("fusedopt._C", str(path))
    spec = importlib.util.spec_from_loader("fusedopt._C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["fusedopt._C"] = module
    library = shim.load(path)
    pointer, capsule = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule.restype = ctypes.py_object
    capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name = b"dlpack_exchange_api"  # a capsule keeps the pointer, so this must not go
    library.fake_gpu_exchange.restype = ctypes.c_void_p
    library.fake_gpu_exchange.argtypes = [ctypes.c_void_p]
    real = pointer(getattr(torch.Tensor, EXCHANGE), name)
    library.exchange_name = name
    setattr(torch.Tensor, EXCHANGE, capsule(library.fake_gpu_exchange(real), name, None))
    set_stream(0, STREAM)


STREAM = 0x1000


def set_stream(device: int, stream: int) -> None:
    """What torch says is the current stream of a GPU."""
    library.fake_gpu_stream(device, ctypes.c_void_p(stream))


def place(tensor: Any, device: int) -> Any:
    """Moves the memory of a tensor to a GPU, or to the ``HOST``, until ``forget``."""
    storage = tensor.untyped_storage()
    begin = storage.data_ptr()
    library.fake_gpu_place(
        ctypes.c_size_t(begin), ctypes.c_size_t(begin + storage.nbytes()), device
    )
    return tensor


def forget() -> None:
    library.fake_gpu_forget()


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """All memory that was not placed is the CPU's."""
    library.fake_gpu_elsewhere(HOST)
    try:
        yield
    finally:
        library.fake_gpu_elsewhere(0)


@contextlib.contextmanager
def host_scalars() -> Iterator[None]:
    """0-d tensors lie on the CPU, as torch's step counters do by default."""
    library.fake_gpu_host_scalars(1)
    try:
        yield
    finally:
        library.fake_gpu_host_scalars(0)


def current_device() -> int:
    device = ctypes.c_int(-1)
    library.cudaGetDevice(ctypes.byref(device))
    return device.value


def take_launches() -> list[tuple[str, int, int]]:
    """(kernel, device, stream) of every launch since the last call."""
    lines = library.cuda_host_take_launches().decode().splitlines()
    fields = [line.split("\t") for line in lines]
    return [(f[0], int(f[6]), int(f[4])) for f in fields]
