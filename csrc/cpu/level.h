/* level.h: the body of one instruction-set level. cpu/levels/<level>.c defines PM_LEVEL and PM_WIDTH,
 * sets the target, and includes this file: every op is written once, over the vector type of simd.h,
 * and compiled once per level. Everything is static but the table at the end. (One pragma per level
 * instead of compiler flags per file, which setuptools does not have.) */

#include "simd.h"

#include "product.h"
#include "twins.h"

#include "gaussian_noise.c"
#include "rectified_flow.c"

#include "patch_embed.c"
#include "timestep_embedding.c"
#include "linear.c"
#include "label_embedding.c"
#include "silu.c"

#include "residual_layernorm_modulate.c"
#include "attention.c"

#include "conditional_routing.c"
#include "prototypical_routing.c"
#include "router_gate.c"
#include "token_choice.c"
#include "routing_plan.c"
#include "routing_contrastive_loss.c"
#include "load_balance_loss.c"

#include "experts.c"

#include "unpatchify.c"
#include "mse_loss.c"

#include "grad_norm.c"
#include "adamw.c"
#include "euler_step.c"

#define PM_PASTE(a, b) a##b
#define PM_NAME(a, b) PM_PASTE(a, b)
#define PM_WORDS(a) #a
#define PM_TEXT(a) PM_WORDS(a)

#define PM_COMPUTE PM_FP32
#define PM_PRODUCTS PM_FP32
#define PM_TABLE PM_NAME(pm_cpu_, PM_LEVEL)
#include "table.h"
#define PM_COMPUTE PM_BF16_EMULATED
#define PM_PRODUCTS PM_BF16_EMULATED
#define PM_TABLE PM_NAME(pm_cpu_emulated_, PM_LEVEL)
#include "table.h"
#if PM_HAS_BF16
#define PM_COMPUTE PM_BF16
#define PM_PRODUCTS PM_BF16
#define PM_TABLE PM_NAME(pm_cpu_bf16_, PM_LEVEL)
#include "table.h"
#endif

/* The level amx is this code too: nothing but its products of bf16 differs, and only by their kind. */
#if PM_HAS_AMX
#undef PM_LEVEL
#define PM_LEVEL amx
#define PM_COMPUTE PM_FP32
#define PM_PRODUCTS PM_FP32
#define PM_TABLE pm_cpu_amx
#include "table.h"
#define PM_COMPUTE PM_BF16_EMULATED
#define PM_PRODUCTS PRODUCT_AMX_EMULATED
#define PM_TABLE pm_cpu_emulated_amx
#include "table.h"
#define PM_COMPUTE PM_BF16
#define PM_PRODUCTS PRODUCT_AMX
#define PM_TABLE pm_cpu_bf16_amx
#include "table.h"
#endif
