/* Stands in for libnvidia-ml.so.1: the functions that memtrack binds, with the layouts and return codes of nvml.h.
 *
 * What there is stands in a file beside the library, NAME.state, which is read anew at each call:
 *
 *   gpu UUID MODEL TOTAL RESERVED USED MIG       a device, bytes; MIG 0 or 1
 *   mig GPU UUID GI CI TOTAL RESERVED USED       a MIG part of the device with that number
 *   process c|g DEVICE PID BYTES                 a context; DEVICE as in handles: parts count from 100
 *   error FUNCTION CODE [DEVICE]                 what a function returns
 *   delay FUNCTION MILLISECONDS                  how long it takes
 *
 * Each call adds a line "FUNCTION [DEVICE]" to NAME.calls. With -DOLD it is that of a driver before 418: no function
 * of a later version, no MIG. The third version of the lists writes 32 bytes an entry, as drivers 530 to 535.86 did.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long long u64;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } Memory2;
typedef struct { unsigned pid; u64 used; } Process1;
typedef struct { unsigned pid; u64 used; unsigned gi, ci; } Process2;
typedef struct { unsigned pid; u64 used; unsigned gi, ci; u64 protected; } Process3;
typedef struct { char uuid[80], model[96]; int mig, parent, gi, ci; u64 total, reserved, used; } Device;

enum { OK, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND = 6, INSUFFICIENT_SIZE, VERSION_MISMATCH = 25 };
enum { FIRST_PART = 100, BASE = 0x1000 };

static int initialised;

static const char *beside(const char *suffix) {
    static __thread char path[4096];
    Dl_info self;
    dladdr((void *)beside, &self);
    snprintf(path, sizeof path, "%s.%s", self.dli_fname, suffix);
    return path;
}

static FILE *state(void) { return fopen(beside("state"), "r"); }

/* Note the call, take as long as is said, and return what is said. */
static int enter(const char *function, int device) {
    char line[256], name[96], text[128];
    int code = OK, value, only, fields;
    long milliseconds = 0;
    int length = device < 0 ? snprintf(text, sizeof text, "%s\n", function)
                            : snprintf(text, sizeof text, "%s %d\n", function, device);
    int fd = open(beside("calls"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (write(fd, text, length) != length) abort();
    close(fd);
    FILE *file = state();
    while (file && fgets(line, sizeof line, file)) {
        if ((fields = sscanf(line, "error %95s %d %d", name, &value, &only)) >= 2 && !strcmp(name, function)
            && (fields == 2 || only == device))
            code = value;
        if (sscanf(line, "delay %95s %d", name, &value) == 2 && !strcmp(name, function))
            milliseconds = value;
    }
    if (file) fclose(file);
    struct timespec pause = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&pause, NULL);
    if (code == OK && !initialised && strncmp(function, "nvmlInit", 8))
        return UNINITIALIZED;
    return code;
}

/* Device NUMBER, counted in the file; parts from FIRST_PART on. */
static int find(int number, Device *found) {
    char line[256];
    int gpus = 0, parts = FIRST_PART, hit = 0;
    FILE *file = state();
    while (!hit && file && fgets(line, sizeof line, file)) {
        Device d = {.parent = -1};
        if (sscanf(line, "gpu %79s %95s %llu %llu %llu %d", d.uuid, d.model, &d.total, &d.reserved, &d.used, &d.mig) == 6)
            hit = gpus++ == number;
        else if (sscanf(line, "mig %d %79s %d %d %llu %llu %llu", &d.parent, d.uuid, &d.gi, &d.ci, &d.total,
                        &d.reserved, &d.used) == 7) {
            strcpy(d.model, "part");
            hit = parts++ == number;
        }
        if (hit) *found = d;
    }
    if (file) fclose(file);
    return hit;
}

static int number_of(void *handle) { return (int)((uintptr_t)handle - BASE); }

#define ENTER(handle, device) \
    Device device; \
    int code = enter(__func__, number_of(handle)); \
    if (code) return code; \
    if (!find(number_of(handle), &device)) return INVALID_ARGUMENT;

static int count(unsigned *found) {
    Device device;
    for (*found = 0; find(*found, &device); ++*found) {}
    return OK;
}

static int by_index(unsigned index, void **handle) {
    Device device;
    if (!find(index, &device)) return INVALID_ARGUMENT;
    *handle = (void *)(uintptr_t)(BASE + index);
    return OK;
}

static int text(const char *from, char *to, unsigned length) {
    if (length <= strlen(from)) return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return OK;
}

/* The contexts of one kind on a device, in entries of SIZE bytes; what is behind pid and bytes says "no MIG". */
static int list(char kind, int device, unsigned *room, char *entries, size_t size) {
    char line[256], of;
    int at;
    unsigned pid, found = 0;
    u64 used;
    FILE *file = state();
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "process %c %d %u %llu", &of, &at, &pid, &used) != 4 || of != kind || at != device) continue;
        if (found < *room && entries) {
            Process3 entry = {.pid = pid, .used = used, .gi = ~0u, .ci = ~0u};
            memcpy(entries + found * size, &entry, size);
        }
        found++;
    }
    if (file) fclose(file);
    int code = found > *room ? INSUFFICIENT_SIZE : OK;
    *room = found;
    return code;
}

int nvmlInit(void) { int code = enter(__func__, -1); if (!code) initialised = 1; return code; }
int nvmlShutdown(void) { int code = enter(__func__, -1); if (!code) initialised = 0; return code; }
int nvmlDeviceGetCount(unsigned *found) { int code = enter(__func__, -1); return code ? code : count(found); }
int nvmlDeviceGetHandleByIndex(unsigned index, void **handle) {
    int code = enter(__func__, index);
    return code ? code : by_index(index, handle);
}
int nvmlSystemGetDriverVersion(char *to, unsigned length) {
    int code = enter(__func__, -1);
    return code ? code : text("550.54.15", to, length);
}
int nvmlDeviceGetUUID(void *handle, char *to, unsigned length) {
    ENTER(handle, device)
    return text(device.uuid, to, length);
}
int nvmlDeviceGetName(void *handle, char *to, unsigned length) {
    ENTER(handle, device)
    return text(device.model, to, length);
}
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    ENTER(handle, device)
    *memory = (Memory){device.total, device.total - device.reserved - device.used, device.reserved + device.used};
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *room, Process1 *found) {
    ENTER(handle, device)
    return list('c', number_of(handle), room, (char *)found, sizeof *found);
}
int nvmlDeviceGetGraphicsRunningProcesses(void *handle, unsigned *room, Process1 *found) {
    ENTER(handle, device)
    return list('g', number_of(handle), room, (char *)found, sizeof *found);
}
const char *nvmlErrorString(int code) {
    switch (code) {
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

#ifndef OLD
int nvmlInit_v2(void) { int code = enter(__func__, -1); if (!code) initialised = 1; return code; }
int nvmlDeviceGetCount_v2(unsigned *found) { int code = enter(__func__, -1); return code ? code : count(found); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    int code = enter(__func__, index);
    return code ? code : by_index(index, handle);
}
int nvmlDeviceGetMemoryInfo_v2(void *handle, Memory2 *memory) {
    ENTER(handle, device)
    if (memory->version != (sizeof *memory | 2 << 24)) return VERSION_MISMATCH;
    u64 free = device.total - device.reserved - device.used;
    *memory = (Memory2){memory->version, device.total, device.reserved, free, device.used};
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *room, Process2 *found) {
    ENTER(handle, device)
    return list('c', number_of(handle), room, (char *)found, sizeof *found);
}
int nvmlDeviceGetGraphicsRunningProcesses_v2(void *handle, unsigned *room, Process2 *found) {
    ENTER(handle, device)
    return list('g', number_of(handle), room, (char *)found, sizeof *found);
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *room, Process3 *found) {
    ENTER(handle, device)
    return list('c', number_of(handle), room, (char *)found, sizeof *found);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *room, Process3 *found) {
    ENTER(handle, device)
    return list('g', number_of(handle), room, (char *)found, sizeof *found);
}
int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    ENTER(handle, device)
    if (device.mig < 0) return NOT_SUPPORTED;
    *current = *pending = device.mig;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *found) {
    ENTER(handle, device)
    *found = 7;
    return OK;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **part) {
    ENTER(handle, device)
    Device other;
    unsigned seen = 0;
    for (int number = FIRST_PART; find(number, &other); number++)
        if (other.parent == number_of(handle) && seen++ == index) {
            *part = (void *)(uintptr_t)(BASE + number);
            return OK;
        }
    return NOT_FOUND;
}
int nvmlDeviceGetGpuInstanceId(void *handle, unsigned *id) {
    ENTER(handle, device)
    *id = device.gi;
    return OK;
}
int nvmlDeviceGetComputeInstanceId(void *handle, unsigned *id) {
    ENTER(handle, device)
    *id = device.ci;
    return OK;
}
#endif
