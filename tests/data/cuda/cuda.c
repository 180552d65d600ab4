/* A library that stands in for NVIDIA's libcuda.so.1: one device with 1 GiB.

   After CUDA's driver API reference: every call but cuInit fails until cuInit was called in this very process; a child
   that was forked after it cannot use CUDA at all. Each call is noted in the file "<path of the library>.calls", with
   the pid of the caller. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3 };

static const size_t total = (size_t)1 << 30;
static size_t used;
static pid_t initialised;
static int has_context;

static void note(const char *name)
{
    Dl_info info;
    char path[4096];
    if (!dladdr((void *)note, &info))
        return;
    snprintf(path, sizeof path, "%s.calls", info.dli_fname);
    FILE *file = fopen(path, "a");
    if (file) {
        fprintf(file, "%s %d\n", name, (int)getpid());
        fclose(file);
    }
}

static int ready(const char *name)
{
    note(name);
    return initialised == getpid();
}

int cuInit(unsigned flags)
{
    note("cuInit");
    if (flags)
        return INVALID_VALUE;
    if (initialised && initialised != getpid())
        return NOT_INITIALIZED;
    initialised = getpid();
    return SUCCESS;
}

int cuDeviceGetCount(int *count)
{
    *count = 1;
    return ready("cuDeviceGetCount") ? SUCCESS : NOT_INITIALIZED;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    *flags = 0;
    *active = has_context;
    return ready("cuDevicePrimaryCtxGetState") && device == 0 ? SUCCESS : NOT_INITIALIZED;
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
    *context = &has_context;
    if (!ready("cuDevicePrimaryCtxRetain") || device != 0)
        return NOT_INITIALIZED;
    has_context = 1;
    return SUCCESS;
}

int cuMemAlloc_v2(unsigned long long *pointer, size_t size)
{
    if (!ready("cuMemAlloc_v2") || !has_context)
        return NOT_INITIALIZED;
    if (size > total - used)
        return OUT_OF_MEMORY;
    used += size;
    *pointer = 0x7f0000000000 + used;
    return SUCCESS;
}
