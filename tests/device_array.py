"""NumPy's memory as an array on a fake GPU (see where.py) that has nothing but DLPack."""

import ctypes

import numpy as np

VERSIONED = b"dltensor_versioned"
CUDA = 2
CODES = {"f": 2, "i": 0, "c": 5}  # DLPack's, by NumPy's kind


class Managed(ctypes.Structure):  # DLManagedTensorVersioned
    _fields_ = [
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class DeviceArray:
    """A NumPy array's memory as that of GPU ``device``; ``streams`` collects what consumers say."""

    def __init__(self, array: np.ndarray, device: int = 0):
        self.array, self.device, self.streams = array, device, []
        self.shape, self.dtype = array.shape, array.dtype
        numbers = ctypes.c_int64 * max(array.ndim, 1)
        strides = (stride // array.itemsize for stride in array.strides)
        self.managed = Managed(
            version=(1, 0),
            data=array.ctypes.data,
            device=(CUDA, device),
            ndim=array.ndim,
            code=CODES[array.dtype.kind],
            bits=8 * array.itemsize,
            lanes=1,
            shape=numbers(*array.shape),
            strides=numbers(*strides),
        )

    def __dlpack_device__(self):
        return (CUDA, self.device)

    def __dlpack__(self, *, max_version=None, stream=None):
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), VERSIONED, None)
