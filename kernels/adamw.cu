// adamw.cu: contract in csrc/ops/adamw.h. First one thread works out, in double, what is the same for
// all numbers: hyper and norm are read on the device, so a captured graph sees those of its replay.
// Then one sweep over the slabs, a thread per four numbers: grad, param, m, v and avg are read and
// written once, 16 bytes at a time: 40 M bytes, 32 M without avg; and 2 for the bf16 shadow of what lies
// in a matrix, found by walking the list from the matrix of the block's first number. No number needs
// another, so where one lies in a slab changes no bit, and with every product and sum spelled out
// (fmaf) they are the CPU's, as far as pow is.
#include <math.h>

#include "common.cuh"

namespace {

enum { WRONG, SKIP, MOVE }; // hyper is out of range: nothing changes; norm is not finite; as asked

struct settings {
    int what;
    float scale;                                // c, of the clip
    float decay;                                // lr weight_decay
    float beta1, beta1_rest, beta2, beta2_rest; // rest: 1 - beta
    float step;                                 // lr / (1 - beta1^step)
    float root;                                 // 1 / sqrt(1 - beta2^step)
    float eps;
    float ema_rest; // 1 - ema
};

// Whether hyper[i] is in its range; every comparison is false for a NaN.
PM_DEVICE bool in_range(int i, double value)
{
    switch (i) {
    case PM_HYPER_STEP:
        return value >= 1;
    case PM_HYPER_BETA1:
    case PM_HYPER_BETA2:
        return value >= 0 && value < 1;
    case PM_HYPER_EMA:
        return value >= 0 && value <= 1;
    case PM_HYPER_EPS:
    case PM_HYPER_CLIP:
        return value >= 0;
    default: // lr, weight_decay
        return isfinite(value);
    }
}

__global__ void settings_kernel(const double *__restrict__ h, const double *__restrict__ norm,
                                settings *__restrict__ s, unsigned long long *fault)
{
    s->what = isfinite(*norm) ? MOVE : SKIP;
    for (int i = 0; i < PM_HYPER_COUNT; i++)
        if (!in_range(i, h[i])) {
            pm_fault(fault, PM_FAULT_ADAMW_HYPER, i);
            s->what = WRONG;
        }
    const double lr = h[PM_HYPER_LR], beta1 = h[PM_HYPER_BETA1], beta2 = h[PM_HYPER_BETA2];
    const double clip = h[PM_HYPER_CLIP] / (*norm + 1e-6);
    s->scale = h[PM_HYPER_CLIP] > 0 && clip < 1 ? (float)clip : 1;
    s->decay = (float)(lr * h[PM_HYPER_WEIGHT_DECAY]);
    s->beta1 = (float)beta1;
    s->beta1_rest = (float)(1 - beta1);
    s->beta2 = (float)beta2;
    s->beta2_rest = (float)(1 - beta2);
    s->step = (float)(lr / (1 - pow(beta1, h[PM_HYPER_STEP])));
    s->root = (float)(1 / sqrt(1 - pow(beta2, h[PM_HYPER_STEP])));
    s->eps = (float)h[PM_HYPER_EPS];
    s->ema_rest = (float)(1 - h[PM_HYPER_EMA]);
}

// One number: its new m, v and, returned, its new value.
PM_DEVICE float move(const settings &s, float p, float g, float *m, float *v)
{
    g *= s.scale;
    *m = fmaf(s.beta1_rest, g, s.beta1 * *m);
    *v = fmaf(s.beta2_rest * g, g, s.beta2 * *v);
    const float size = fmaf(sqrtf(*v), s.root, s.eps);
    p = fmaf(-s.decay, p, p);
    return fmaf(-s.step, *m / size, p);
}

// The average moves by a part of what it lacks: exact when it lacks nothing.
PM_DEVICE float average(const settings &s, float avg, float p)
{
    return fmaf(s.ema_rest, p - avg, avg);
}

using pack = pm_pack<float>;
PM_DEVICE pack &pack_at(float *p) { return *reinterpret_cast<pack *>(p); }

// The matrix of the list that ends behind number i, counting from one that does not come later.
PM_DEVICE int64_t matrix_after(const pm_twins &twins, int64_t from, int64_t i)
{
    while (from < twins.count && twins.list[from].at + twins.list[from].F * twins.list[from].D <= i)
        from++;
    return from;
}

// The bf16 shadows of the numbers i .. i+n-1 (n <= 4), where they belong to a matrix; the one that has
// number i is not before `from`. Four of one matrix go in one store.
PM_DEVICE void shadow(const pm_twins &twins, int64_t from, int64_t i, int n, const float *p)
{
    int64_t at = matrix_after(twins, from, i);
    for (int k = 0; k < n; k++) {
        at = matrix_after(twins, at, i + k);
        if (at == twins.count)
            return;
        const pm_twin &t = twins.list[at];
        const int64_t place = i + k - t.at; // in the matrix, once it is not negative
        bf16 *const to = reinterpret_cast<bf16 *>(static_cast<char *>(twins.derived) + t.derived);
        if (place >= 0 && place % pack::SIZE == 0 && k + pack::SIZE <= n &&
            place + pack::SIZE <= t.F * t.D) {
            struct alignas(8) four {
                bf16 v[pack::SIZE];
            } all;
#pragma unroll
            for (int j = 0; j < pack::SIZE; j++)
                all.v[j] = pm_to<bf16>(p[k + j]);
            *reinterpret_cast<four *>(to + place) = all;
            return; // n is at most as many
        }
        if (place >= 0)
            to[place] = pm_to<bf16>(p[k]);
    }
}

// wide: every slab is aligned to 16 bytes. The last numbers of slabs go one at a time.
__global__ void __launch_bounds__(256)
    sweep_kernel(int64_t M, bool wide, const settings *__restrict__ set, float *__restrict__ grad,
                 float *__restrict__ param, float *__restrict__ m, float *__restrict__ v,
                 float *__restrict__ avg, pm_twins twins)
{
    __shared__ int64_t first; // the matrix that the block's first number may be in
    const int64_t i = pack::SIZE * pm_thread();
    const settings s = *set;
    if (twins.count) {
        if (threadIdx.x == 0) {
            const int64_t begin = pack::SIZE * (int64_t)blockIdx.x * blockDim.x;
            int64_t low = 0, high = twins.count; // the first one that ends behind begin
            while (low < high) {
                const int64_t middle = (low + high) / 2;
                const pm_twin &t = twins.list[middle];
                if (t.at + t.F * t.D <= begin)
                    low = middle + 1;
                else
                    high = middle;
            }
            first = low;
        }
        __syncthreads();
    }
    if (i >= M || s.what == WRONG)
        return;
    if (wide && i + pack::SIZE <= M) {
        if (s.what == MOVE) {
            const pack g = pack_at(grad + i);
            pack p = pack_at(param + i), pm = pack_at(m + i), pv = pack_at(v + i);
            pack a = avg ? pack_at(avg + i) : pack{};
#pragma unroll
            for (int k = 0; k < pack::SIZE; k++) {
                p.v[k] = move(s, p.v[k], g.v[k], &pm.v[k], &pv.v[k]);
                a.v[k] = average(s, a.v[k], p.v[k]);
            }
            pack_at(param + i) = p;
            pack_at(m + i) = pm;
            pack_at(v + i) = pv;
            if (avg)
                pack_at(avg + i) = a;
            if (twins.count)
                shadow(twins, first, i, pack::SIZE, p.v);
        }
        pack_at(grad + i) = pack{};
        return;
    }
    for (int64_t j = i; j < i + pack::SIZE && j < M; j++) {
        if (s.what == MOVE) {
            param[j] = move(s, param[j], grad[j], &m[j], &v[j]);
            if (avg)
                avg[j] = average(s, avg[j], param[j]);
            if (twins.count)
                shadow(twins, first, j, 1, param + j);
        }
        grad[j] = 0;
    }
}

} // namespace

template <class T> size_t adamw_workspace(const pm_ctx *, const pm_adamw_args *, bool)
{
    return pm_room(1, sizeof(settings));
}

template <class T> pm_status adamw_forward(pm_ctx *ctx, const pm_adamw_args *g, void *scratch)
{
    settings *const set = pm_take<settings>(&scratch, 1);
    const bool wide = pm_aligned(g->grad) && pm_aligned(g->param) && pm_aligned(g->m) &&
                      pm_aligned(g->v) && pm_aligned(g->avg);
    PM_RUN(ctx, settings_kernel, 1, 1, 0, g->hyper, g->norm, set, pm_device().fault);
    PM_RUN(ctx, sweep_kernel, pm_blocks(g->M, 256 * pack::SIZE), 256, 0, g->M, wide, set, g->grad,
           g->param, g->m, g->v, g->avg, g->twins);
    return PM_OK;
}

PM_INSTANTIATE_FORWARD(adamw)
