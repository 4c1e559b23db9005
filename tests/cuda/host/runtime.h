// runtime.h: what cublaslt.cpp needs of the runtime stand-in.
#pragma once
#include "cuda_runtime.h"
#include "internal.h"

namespace pm_host {

// Runs work when the stream comes to it, or records it while the stream captures. Work that fails
// sets `fault`. False: the stream is no stream (complaint).
bool submit(cudaStream_t stream, std::function<void()> work);
void count_launch(const char *name); // for pm_host_launches

} // namespace pm_host
