/* gaussian_noise: contract in ops/gaussian_noise.h. */

/* B samples of M draws in tasks of about NOISE_BLOCK draws (10 microseconds with FMA): many small
 * samples or a part of a large one. NOISE_BLOCK is a multiple of 4, a Philox block. */
enum { NOISE_BLOCK = 4096 };

static int64_t noise_rows(int64_t M) { return M >= NOISE_BLOCK ? 1 : NOISE_BLOCK / pm_max(1, M); }
static int64_t noise_columns(int64_t M) { return pm_blocks(M, NOISE_BLOCK); }
static int64_t noise_tasks(int64_t B, int64_t M)
{
    return pm_blocks(B, noise_rows(M)) * noise_columns(M);
}

/* Where a task works: samples b .. b_end - 1, their elements i .. i + n - 1. */
typedef struct {
    int64_t b, b_end, i, n;
} noise_range;

static noise_range noise_place(int64_t B, int64_t M, int64_t task)
{
    const int64_t rows = noise_rows(M), columns = noise_columns(M);
    const int64_t b = task / columns * rows, i = task % columns * NOISE_BLOCK;
    return (noise_range){b, pm_min(B, b + rows), i, pm_min(NOISE_BLOCK, M - i)};
}

/* The position of sample b; it wraps around. */
static int64_t noise_position(const int64_t key[2], int64_t b)
{
    return (int64_t)((uint64_t)key[1] + (uint64_t)b);
}

/* Draws first .. first + n - 1 of the normal stream of one position; first is a multiple of 4. */
static __attribute__((noinline)) void noise_draws(int64_t seed, uint32_t stream, int64_t position,
                                                  int64_t first, int64_t n, float *out)
{
    pm_draws(seed, stream, position, first, n, out, 1);
}

static void gaussian_noise_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const pm_gaussian_noise_args *const g = arg;
    const noise_range at = noise_place(g->B, g->M, task);
    for (int64_t b = at.b; b < at.b_end; b++)
        noise_draws(g->key[0], PM_STREAM_SAMPLER, noise_position(g->key, b), at.i, at.n,
                    g->x + b * g->M + at.i);
}

static size_t gaussian_noise_workspace(const pm_ctx *ctx, const pm_gaussian_noise_args *g,
                                       bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status gaussian_noise_forward(pm_ctx *ctx, const pm_gaussian_noise_args *g, void *scratch)
{
    (void)scratch;
    pm_parallel(ctx->pool, noise_tasks(g->B, g->M), gaussian_noise_task, (void *)g);
    return PM_OK;
}
