/* The driver of tests/unit with room for all that torch allocates, and what torch and Triton ask of one beside that. */
#define MOST_ALLOCATIONS 8192
#include "../unit/stand_in_cuda.c"

int cuInit(unsigned int flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "an error"; return SUCCESS; }
int cuDevicePrimaryCtxGetState(int device, unsigned int *flags, int *active) {
    *flags = 0, *active = 1;
    return SUCCESS;
}
int cuDeviceGetAttribute(int *value, int what, int device) { /* by number: cuda.h is not needed */
    *value = what == 10 ? 32 : what == 16 ? 132 : what == 75 ? 9 : what == 76 ? 0 : what == 97 ? 232448 : 65536;
    return SUCCESS;
}
int cuPointerGetAttribute(void *value, int what, CUdeviceptr address) { *(CUdeviceptr *)value = address; return SUCCESS; }
int cuCtxGetLimit(size_t *value, int what) { *value = 0; return SUCCESS; }
int cuCtxSetLimit(int what, size_t value) { return SUCCESS; }
int cuModuleLoadData(void **module, const void *image) { *module = &current; return SUCCESS; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = &current; return SUCCESS; }
int cuFuncGetAttribute(int *value, int what, void *function) { *value = what == 0 ? 1024 : what == 3 ? 0 : 32; return SUCCESS; }
int cuFuncSetAttribute(void *function, int what, int value) { return SUCCESS; }
int cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
    return current ? SUCCESS : INVALID_CONTEXT;
}
