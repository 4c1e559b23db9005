/* status.c: the message of the last failure. */
#include <stdarg.h>
#include <stdio.h>

#include "../promoe.h"

pm_status pm_fail(pm_ctx *ctx, pm_status status, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(ctx->message, sizeof ctx->message, format, list);
    va_end(list);
    return status;
}
