// A stream's type as the CUDA runtime declares it, for those who only hand one on.
#pragma once

struct CUstream_st;
using cudaStream_t = CUstream_st*;
