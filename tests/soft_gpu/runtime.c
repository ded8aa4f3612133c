/* What torch's CUDA build calls of the CUDA runtime and of cuBLAS in tests/gpu, where there is no GPU: memory is the
 * host's (the driver's, ../unit/stand_in_cuda.c, so that it can be shared by IPC), copies are done at once, kernels do
 * nothing. softgpu.py computes what they would have. After fake_busy(1), which stands for torch.cuda._sleep, recorded
 * events are not done until something waits, and what has a host wait ends that: also what torch's
 * set_sync_debug_mode does not see. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CALL(name, ...) cudaError_t name(__VA_ARGS__)
#define NOTHING(name, ...) CALL(name, __VA_ARGS__) { return cudaSuccess; }

struct event { unsigned int flags; int busy; };
static volatile int busy;
static __thread cudaError_t last;
static __thread cudaStream_t capturing;
static struct { char *start; size_t size; int kind; } known[65536];
static int count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void fake_busy(int whether) { busy = whether; }

static void add(void *start, size_t size, int kind) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < count && known[i].start) i++;
    if (i == count) count++;
    known[i].start = start, known[i].size = size, known[i].kind = kind;
    pthread_mutex_unlock(&lock);
}

static void forget(void *start) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < count; i++)
        if (known[i].start == start) known[i].start = NULL;
    pthread_mutex_unlock(&lock);
}

static int kind_of(const void *address) {
    int kind = cudaMemoryTypeUnregistered;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < count; i++)
        if (known[i].start && (char *)address >= known[i].start && (char *)address < known[i].start + known[i].size)
            kind = known[i].kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

/* devices */
CALL(cudaGetDeviceCount, int *n) { *n = 1; return cudaSuccess; }
CALL(cudaGetDevice, int *device) { *device = 0; return cudaSuccess; }
CALL(cudaSetDevice, int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
CALL(cudaDriverGetVersion, int *version) { *version = 13000; return cudaSuccess; }
CALL(cudaRuntimeGetVersion, int *version) { *version = 13000; return cudaSuccess; }
CALL(cudaGetDeviceProperties, struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "no GPU");
    p->major = 9, p->multiProcessorCount = 132, p->warpSize = 32, p->totalGlobalMem = (size_t)139 << 30;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->regsPerBlock = 65536;
    p->regsPerMultiprocessor = 65536, p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472, p->l2CacheSize = 50 << 20, p->textureAlignment = 512;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    for (int i = 0; i < 16; i++) p->uuid.bytes[i] = (char)(i * 7 + 1);
    return cudaSuccess;
}
CALL(cudaDeviceGetAttribute, int *value, enum cudaDeviceAttr what, int device) {
    *value = what == cudaDevAttrMultiProcessorCount        ? 132
           : what == cudaDevAttrComputeCapabilityMajor     ? 9
           : what == cudaDevAttrComputeCapabilityMinor     ? 0
           : what == cudaDevAttrMaxThreadsPerBlock         ? 1024
           : what == cudaDevAttrWarpSize                   ? 32
                                                           : 1;
    return cudaSuccess;
}
CALL(cudaDeviceGetStreamPriorityRange, int *least, int *greatest) { *least = 0, *greatest = -5; return cudaSuccess; }
CALL(cudaDeviceSynchronize, void) { busy = 0; return cudaSuccess; }
CALL(cudaDeviceCanAccessPeer, int *can, int a, int b) { *can = 0; return cudaSuccess; }
CALL(cudaDeviceGetPCIBusId, char *id, int size, int device) { snprintf(id, size, "0000:01:00.0"); return cudaSuccess; }
CALL(cudaMemGetInfo, size_t *free, size_t *total) { *total = (size_t)139 << 30, *free = *total / 2; return cudaSuccess; }
CALL(cudaGetLastError, void) { cudaError_t error = last; last = cudaSuccess; return error; }
CALL(cudaPeekAtLastError, void) { return last; }

/* memory */
static void *driver(const char *name) { return dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL), name); }
static void make_current(void) {
    void *context = NULL;
    ((int (*)(void **))driver("cuCtxGetCurrent"))(&context);
    if (context) return;
    int device = 0;
    ((int (*)(int *, int))driver("cuDeviceGet"))(&device, 0);
    ((int (*)(void **, int))driver("cuDevicePrimaryCtxRetain"))(&context, device);
    ((int (*)(void *))driver("cuCtxSetCurrent"))(context);
}
CALL(cudaMalloc, void **memory, size_t size) {
    make_current();
    unsigned long long address = 0;
    int error = ((int (*)(unsigned long long *, size_t))driver("cuMemAlloc_v2"))(&address, size);
    busy = 0;
    if (error) return cudaErrorMemoryAllocation;
    add(*memory = (void *)address, size, cudaMemoryTypeDevice);
    return cudaSuccess;
}
CALL(cudaFree, void *memory) {
    if (!memory) return cudaSuccess;
    make_current();
    busy = 0;
    forget(memory);
    ((int (*)(unsigned long long))driver("cuMemFree_v2"))((unsigned long long)memory);
    return cudaSuccess;
}
CALL(cudaHostAlloc, void **memory, size_t size, unsigned int flags) {
    busy = 0;
    if (posix_memalign(memory, 4096, size ? size : 1)) return cudaErrorMemoryAllocation;
    add(*memory, size, cudaMemoryTypeHost);
    return cudaSuccess;
}
CALL(cudaFreeHost, void *memory) { forget(memory); free(memory); return cudaSuccess; }
CALL(cudaPointerGetAttributes, struct cudaPointerAttributes *found, const void *address) {
    memset(found, 0, sizeof *found);
    found->type = kind_of(address);
    if (found->type) found->devicePointer = found->hostPointer = (void *)address;
    return cudaSuccess;
}
CALL(cudaMemcpy, void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    busy = 0;
    memmove(to, from, size);
    return cudaSuccess;
}
CALL(cudaMemcpyAsync, void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (kind != cudaMemcpyDeviceToDevice && !(kind_of(to) && kind_of(from))) busy = 0; /* of what is not pinned */
    memmove(to, from, size);
    return cudaSuccess;
}
CALL(cudaMemsetAsync, void *to, int value, size_t size, cudaStream_t stream) { memset(to, value, size); return cudaSuccess; }
CALL(cudaMemset, void *to, int value, size_t size) { memset(to, value, size); return cudaSuccess; }

/* streams and events */
static long streams = 0x1000;
CALL(cudaStreamCreateWithPriority, cudaStream_t *made, unsigned int flags, int priority) {
    *made = (cudaStream_t)(streams += 16);
    return cudaSuccess;
}
CALL(cudaStreamCreate, cudaStream_t *made) { return cudaStreamCreateWithPriority(made, 0, 0); }
CALL(cudaStreamGetPriority, cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
CALL(cudaStreamSynchronize, cudaStream_t stream) { busy = 0; return cudaSuccess; }
NOTHING(cudaStreamDestroy, cudaStream_t stream)
NOTHING(cudaStreamQuery, cudaStream_t stream)
NOTHING(cudaStreamWaitEvent, cudaStream_t stream, cudaEvent_t event, unsigned int flags)
NOTHING(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode)
CALL(cudaStreamIsCapturing, cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capturing && stream == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
CALL(cudaStreamGetCaptureInfo, cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *size) {
    if (id) *id = 7;
    return cudaStreamIsCapturing(stream, status);
}
CALL(cudaEventCreateWithFlags, cudaEvent_t *made, unsigned int flags) {
    struct event *event = calloc(1, sizeof *event);
    event->flags = flags;
    *made = (cudaEvent_t)event;
    return cudaSuccess;
}
CALL(cudaEventCreate, cudaEvent_t *made) { return cudaEventCreateWithFlags(made, 0); }
CALL(cudaEventDestroy, cudaEvent_t event) { free(event); return cudaSuccess; }
CALL(cudaEventRecordWithFlags, cudaEvent_t event, cudaStream_t stream, unsigned int flags) {
    ((struct event *)event)->busy = busy;
    return cudaSuccess;
}
CALL(cudaEventRecord, cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
CALL(cudaEventQuery, cudaEvent_t event) {
    return last = busy && ((struct event *)event)->busy ? cudaErrorNotReady : cudaSuccess;
}
CALL(cudaEventSynchronize, cudaEvent_t event) { busy = 0; return cudaSuccess; }
CALL(cudaEventElapsedTime, float *ms, cudaEvent_t begin, cudaEvent_t end) { *ms = 1; return cudaSuccess; }
CALL(cudaIpcGetEventHandle, cudaIpcEventHandle_t *handle, cudaEvent_t event) {
    unsigned int needed = cudaEventInterprocess | cudaEventDisableTiming;
    if ((((struct event *)event)->flags & needed) != needed) return cudaErrorInvalidResourceHandle;
    memset(handle, 7, sizeof *handle);
    return cudaSuccess;
}
CALL(cudaIpcOpenEventHandle, cudaEvent_t *made, cudaIpcEventHandle_t handle) {
    for (unsigned int i = 0; i < sizeof handle; i++)
        if (handle.reserved[i] != 7) return cudaErrorInvalidResourceHandle;
    return cudaEventCreateWithFlags(made, cudaEventInterprocess | cudaEventDisableTiming);
}

/* kernels and graphs */
NOTHING(cudaLaunchKernel, const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
NOTHING(cudaLaunchKernelExC, const cudaLaunchConfig_t *config, const void *kernel, void **arguments)
NOTHING(cudaFuncSetAttribute, const void *kernel, enum cudaFuncAttribute what, int value)
CALL(cudaFuncGetAttributes, struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    found->binaryVersion = found->ptxVersion = 90, found->maxThreadsPerBlock = 1024, found->numRegs = 32;
    return cudaSuccess;
}
CALL(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int *n, const void *kernel, int block, size_t shared,
     unsigned int flags) {
    *n = 2;
    return cudaSuccess;
}
CALL(cudaStreamBeginCapture, cudaStream_t stream, enum cudaStreamCaptureMode mode) { capturing = stream; return cudaSuccess; }
CALL(cudaStreamEndCapture, cudaStream_t stream, cudaGraph_t *graph) {
    capturing = NULL;
    *graph = (cudaGraph_t)16;
    return cudaSuccess;
}
CALL(cudaGraphInstantiateWithFlags, cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = (cudaGraphExec_t)16;
    return cudaSuccess;
}
CALL(cudaGraphGetNodes, cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) { *n = 1; return cudaSuccess; }
NOTHING(cudaGraphLaunch, cudaGraphExec_t graph, cudaStream_t stream)
NOTHING(cudaGraphDestroy, cudaGraph_t graph)
NOTHING(cudaGraphExecDestroy, cudaGraphExec_t graph)

/* cuBLAS: what is made is a pointer to nothing */
#define MADE(name) int name(void **made) { *made = (void *)16; return 0; }
#define DONE(name) int name(void) { return 0; }
MADE(cublasCreate_v2) MADE(cublasLtCreate) MADE(cublasLtMatmulDescCreate) MADE(cublasLtMatrixLayoutCreate)
MADE(cublasLtMatmulPreferenceCreate)
DONE(cublasDestroy_v2) DONE(cublasSetStream_v2) DONE(cublasSetWorkspace_v2) DONE(cublasSetMathMode)
DONE(cublasSetPointerMode_v2) DONE(cublasGemmEx) DONE(cublasSgemm_v2) DONE(cublasGemmStridedBatchedEx)
DONE(cublasSgemmStridedBatched) DONE(cublasSgemv_v2) DONE(cublasSgemmEx) DONE(cublasLtMatmul)
DONE(cublasLtMatmulDescDestroy) DONE(cublasLtMatrixLayoutDestroy) DONE(cublasLtMatmulPreferenceDestroy)
DONE(cublasLtMatmulDescSetAttribute) DONE(cublasLtMatrixLayoutSetAttribute)
DONE(cublasLtMatmulPreferenceSetAttribute)
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *found, int *n) {
    *n = 1;
    return 0;
}
