/* What cuda_driver.py calls of the CUDA driver, with its documented signatures, over POSIX shared memory: no GPU, but two
 * processes, handles of 64 bytes that go by value, and the driver's error codes. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef unsigned long long CUdeviceptr;
typedef struct { unsigned char reserved[64]; } CUipcMemHandle;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, MAP_FAILED_ = 205 };

#ifndef MOST_ALLOCATIONS
#define MOST_ALLOCATIONS 16
#endif
static struct { CUdeviceptr base; size_t size; char name[64]; } made[MOST_ALLOCATIONS];
static int count;
static char primary[2];           /* of two devices, 0 and 1; a context is the address of its device's */
static __thread void *current;    /* context */
static int retained;              /* how often a primary context was */

static int find(CUdeviceptr address) {
    for (int i = 0; i < count; i++)
        if (made[i].size && address >= made[i].base && address < made[i].base + made[i].size) return i;
    return -1;
}

static void *map(const char *name, int flags, size_t *size) {
    int file = shm_open(name, flags | O_RDWR, 0600);
    struct stat found;
    if (file < 0 || ((flags & O_CREAT) && ftruncate(file, (off_t)*size)) || fstat(file, &found)) return MAP_FAILED;
    *size = (size_t)found.st_size;
    void *memory = mmap(NULL, *size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return memory;
}

int cuCtxGetCurrent(void **context) {
    *context = current;
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = 40 + ordinal; /* a handle, not the ordinal */
    return ordinal < 0 || ordinal > 1 ? INVALID_DEVICE : SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (device < 40 || device > 41) return INVALID_DEVICE;
    retained++;
    *context = &primary[device - 40];
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) {
    current = context;
    return SUCCESS;
}

/* For the tests: the device of this thread's context, and how many were retained. */
int stand_in_device(void) { return current ? (int)((char *)current - primary) : -1; }
int stand_in_retained(void) { return retained; }

int cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    if (!current) return INVALID_CONTEXT;
    if (size > (size_t)1 << 40 || count == MOST_ALLOCATIONS) return OUT_OF_MEMORY;
    snprintf(made[count].name, sizeof made[count].name, "/stand-in-cuda-%d-%d", (int)getpid(), count);
    void *memory = map(made[count].name, O_CREAT | O_EXCL, &size);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    made[count].size = size;
    *address = made[count++].base = (CUdeviceptr)memory;
    return SUCCESS;
}

int cuMemFree_v2(CUdeviceptr address) {
    if (!current) return INVALID_CONTEXT;
    int i = find(address);
    if (i < 0 || made[i].base != address) return INVALID_VALUE;
    made[i].size = 0;
    return shm_unlink(made[i].name) ? INVALID_VALUE : SUCCESS;
}

int cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
    if (!current) return INVALID_CONTEXT;
    int i = find(address);
    if (i < 0) return INVALID_VALUE;
    *base = made[i].base;
    *size = made[i].size;
    return SUCCESS;
}

int cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    if (!current) return INVALID_CONTEXT;
    int i = find(address);
    if (i < 0) return INVALID_VALUE;
    memcpy(handle->reserved, made[i].name, sizeof handle->reserved);
    return SUCCESS;
}

int cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle, unsigned int flags) {
    if (!current) return INVALID_CONTEXT;
    if (flags != 1) return INVALID_VALUE; /* CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS is all there is */
    size_t size = 0;
    void *memory = map((const char *)handle.reserved, 0, &size);
    if (memory == MAP_FAILED) return MAP_FAILED_;
    *address = (CUdeviceptr)memory;
    return SUCCESS;
}

int cuGetErrorName(int error, const char **name) {
    *name = error == OUT_OF_MEMORY   ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == MAP_FAILED_     ? "CUDA_ERROR_MAP_FAILED"
          : error == INVALID_DEVICE  ? "CUDA_ERROR_INVALID_DEVICE"
          : error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
                                     : "CUDA_ERROR_INVALID_VALUE";
    return SUCCESS;
}
