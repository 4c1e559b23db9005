/* backends.c: which device and which precision mean which backend; the loading of libraries. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plugin.h"

#define REFUSE(...)                                                                                \
    do {                                                                                           \
        snprintf(message, message_bytes, __VA_ARGS__);                                             \
        return NULL;                                                                               \
    } while (0)

/* A library that was loaded; it stays. */
typedef struct {
    const char *device;
    const pm_plugin *plugin;
} library;
static library libraries[] = {{"cuda", NULL}, {"cuda-on-cpu", NULL}};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* NULL when both were built from the same contracts, else what differs. */
static const char *difference(const pm_plugin *p)
{
    if (memcmp(&p->shape, &pm_plugin_own_shape, sizeof p->shape))
        return "the backend table";
    for (size_t i = 0; i < pm_plugin_own_shape.ops; i++) {
        const pm_plugin_op *a = &pm_plugin_ops[i], *b = &p->ops[i];
        if (strcmp(a->op, b->op) || strcmp(a->fields, b->fields) || a->args != b->args ||
            a->grads != b->grads)
            return a->op;
    }
    return NULL;
}

/* The plugin of "cuda" lies beside the extension; that of "cuda-on-cpu" is where the tests say. */
static const char *library_path(const char *device, char *path, size_t bytes)
{
    if (strcmp(device, "cuda"))
        return getenv("PROMOE_CUDA_ON_CPU");
    Dl_info self;
    if (!dladdr((const void *)library_path, &self) || !self.dli_fname)
        return NULL;
    const char *slash = strrchr(self.dli_fname, '/');
    snprintf(path, bytes, "%.*s_cuda.so", slash ? (int)(slash + 1 - self.dli_fname) : 0,
             self.dli_fname);
    return path;
}

static const pm_plugin *load(const char *device, char *message, size_t message_bytes)
{
    char buffer[4096];
    const char *path = library_path(device, buffer, sizeof buffer);
    if (!strcmp(device, "cuda-on-cpu") && !path)
        REFUSE("device 'cuda-on-cpu' runs the CUDA kernels on the CPU, for tests: make test-cuda "
               "builds it, and PROMOE_CUDA_ON_CPU says where it is");
    FILE *file = path ? fopen(path, "rb") : NULL;
    if (!file)
        REFUSE("device '%s': this installation was built without it (there is no %s): `promoe "
               "doctor` says why; to build it, see \"CUDA\" in the README",
               device, path ? path : "_cuda.so");
    fclose(file);
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        REFUSE("device '%s': its library does not load: %s (the libraries of CUDA come with the "
               "toolkit, or with pip install 'promoe[cuda]')",
               device, dlerror());
    const pm_plugin *(*entry)(void) = NULL;
    void *symbol = dlsym(handle, PM_PLUGIN_SYMBOL);
    memcpy(&entry, &symbol, sizeof entry);
    const char *differs = entry ? difference(entry()) : "everything";
    if (differs)
        REFUSE("device '%s': %s was built for another version of promoe (%s differs): build both "
               "again",
               device, path, differs);
    return entry();
}

static const pm_backend *open_library(library *l, pm_compute compute, char *message,
                                      size_t message_bytes)
{
    pthread_mutex_lock(&lock);
    if (!l->plugin)
        l->plugin = load(l->device, message, message_bytes);
    const pm_backend *backend = l->plugin ? l->plugin->open(compute, message, message_bytes) : NULL;
    pthread_mutex_unlock(&lock);
    return backend;
}

const pm_backend *pm_find_backend(const char *device, pm_compute compute, const char *cpu_level,
                                  char *message, size_t message_bytes)
{
    const bool guard = !strcmp(device, "cpu-guard");
    if (guard || !strcmp(device, "cpu")) {
        const pm_backend *cpu = pm_cpu_backend(cpu_level, compute, message, message_bytes);
        return cpu && guard ? pm_guard_backend(cpu) : cpu;
    }
    for (size_t i = 0; i < sizeof libraries / sizeof *libraries; i++)
        if (!strcmp(device, libraries[i].device))
            return open_library(&libraries[i], compute, message, message_bytes);
    REFUSE("device '%s' is not there: one of 'cpu', 'cuda'", device);
}
