// experts_loop.cuh: the oracle of experts.cu, for tests: the same op, a group after another, each
// product by cuBLASLt. It reads the plan back to the host, so no step may use it, and copies what
// it gathers.
#pragma once
#include "common.cuh"

template <class T> size_t pm_experts_loop_room(const pm_experts_args *g);
template <class T>
pm_status pm_experts_loop_forward(pm_ctx *ctx, const pm_experts_args *g, void *scratch);
template <class T>
pm_status pm_experts_loop_backward(pm_ctx *ctx, const pm_experts_args *g, const pm_experts_grads *d,
                                   void *scratch);
