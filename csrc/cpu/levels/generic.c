/* Any CPU: four floats wide (SSE2, NEON), no fused multiply-add assumed. */
#include "../cpu.h"

#define PM_LEVEL generic
#define PM_WIDTH 4
#include "../level.h"
