/* config.c: models that cannot be. Python checks the same and names its fields; this is for callers
 * from C, and so that nothing behind it ever meets an impossible size. */
#include "config.h"

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition))                                                                          \
            return pm_fail(ctx, PM_EINVAL, "config: " __VA_ARGS__);                                \
    } while (0)

static bool within(int64_t value, int64_t least, int64_t most)
{
    return value >= least && value <= most;
}

static pm_status check_grid(pm_ctx *ctx, const pm_config *c)
{
    const int64_t most = (int64_t)1 << 20;
    CHECK(within(c->axes, 1, 3), "1 to 3 axes, not %lld", (long long)c->axes);
    for (int i = 0; i < 3; i++) {
        CHECK(within(c->size[i], 1, most) && within(c->patch[i], 1, c->size[i]) &&
                  c->size[i] % c->patch[i] == 0,
              "axis %d is %lld long, in patches of %lld", i, (long long)c->size[i],
              (long long)c->patch[i]);
        CHECK(i >= 3 - c->axes || c->size[i] == 1, "axis %d is not in use", i);
    }
    CHECK((double)c->size[0] * (double)c->size[1] * (double)c->size[2] < 1e9, "too many voxels");
    return PM_OK;
}

pm_status pm_config_check(pm_ctx *ctx, const pm_config *c)
{
    const int64_t most = (int64_t)1 << 24;
    PM_TRY(check_grid(ctx, c));
    CHECK(within(c->channels, 1, most) && within(c->out_channels, c->channels, most),
          "%lld channels in, %lld out", (long long)c->channels, (long long)c->out_channels);
    CHECK(within(c->hidden, 1, most), "width %lld", (long long)c->hidden);
    CHECK(within(c->heads, 1, 1 << 16) && within(c->head, 1, 1 << 16), "%lld heads of %lld",
          (long long)c->heads, (long long)c->head);
    CHECK(c->hidden % (2 * c->axes) == 0,
          "width %lld is not a multiple of %lld (sin-cos positions)", (long long)c->hidden,
          (long long)(2 * c->axes));
    CHECK(within(c->depth, 1, 1 << 16), "%lld blocks", (long long)c->depth);
    CHECK(within(c->mlp_hidden, 1, most), "a dense FFN %lld wide", (long long)c->mlp_hidden);
    CHECK(within(c->classes, 1, INT32_MAX), "%lld classes", (long long)c->classes);
    CHECK(within(c->experts, 0, 1 << 16), "%lld experts", (long long)c->experts);
    if (c->experts > 0) {
        CHECK(within(c->expert_width, 1, most), "experts %lld wide", (long long)c->expert_width);
        CHECK(!c->shared || within(c->shared_width, 1, most), "a shared expert %lld wide",
              (long long)c->shared_width);
        CHECK(within(c->top_k, 1, c->experts), "%lld of %lld experts for a token",
              (long long)c->top_k, (long long)c->experts);
        CHECK((double)pm_ffn_of(c, 1).F < INT32_MAX, "experts too wide together");
        CHECK(c->contrastive_weight == 0 || c->contrastive_temperature > 0,
              "a contrastive temperature of %g", c->contrastive_temperature);
    }
    CHECK(c->drop_prob >= 0 && c->drop_prob <= 1, "a label drop of %g", c->drop_prob);
    CHECK(c->null_label || c->drop_prob == 0, "a label drop needs a row for no class");
    return PM_OK;
}
