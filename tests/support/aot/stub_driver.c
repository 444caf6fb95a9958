// A CUDA driver that runs nothing: libcuda.so.1 for Triton's own launcher on a machine without a GPU.
//
// It plays one Hopper GPU. Every launch is checked as a driver would (grid, threads, shared memory) and further than one
// can: arguments that the kernel was compiled to know as multiples of 16, pointers above all, must be. A tensor map is
// checked against the driver's documentation (cuTensorMapEncodeTiled). What fails returns an error that says why; the
// rest is counted, and logged where a test asks for it.
#include "cuda.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#undef cuLaunchKernel
#undef cuLaunchKernelEx
#undef cuPointerGetAttribute

enum { MAX_KERNELS = 4096, MAX_PARAMS = 128, MAX_LOG = 1024, SHARED_LIMIT = 232448, SHARED_DEFAULT = 49152 };

typedef struct {
  char name[128];
  int shared_allowed;  // bytes of dynamic shared memory: beyond 48 KiB only after cuFuncSetAttribute
  int num_params;      // -1: not described yet
  unsigned char size[MAX_PARAMS];  // bytes of each parameter; of a tensor map 128
  unsigned char divisor[MAX_PARAMS];
} Kernel;

typedef struct {
  char name[128];
  uint32_t grid[3], threads, shared;
  int num_params;
  int64_t params[MAX_PARAMS];  // of a tensor map: a digest of all that it was made of
} Launch;

static Kernel kernels[MAX_KERNELS];
static int num_kernels;
static Launch launch_log[MAX_LOG];
static int logged;
static long num_launches, num_tensor_maps;
static char message[512];

#define REFUSE(...) return (snprintf(message, sizeof message, __VA_ARGS__), CUDA_ERROR_INVALID_VALUE)

long stub_launches(void) { return num_launches; }
long stub_tensor_maps(void) { return num_tensor_maps; }
void stub_clear_log(void) { logged = 0; }
int stub_log(const Launch** first) { return (*first = launch_log, logged); }

// What Triton's compiler assumed of a kernel's parameters; stub.py reads it in the kernel's TTIR.
void stub_describe(CUfunction function, int count, const unsigned char* size, const unsigned char* divisor) {
  Kernel* kernel = (Kernel*)function;
  kernel->num_params = count;
  memcpy(kernel->size, size, count);
  memcpy(kernel->divisor, divisor, count);
}

static int64_t value_of(const void* param, int size) {
  int64_t value = 0;
  if (size == sizeof(CUtensorMap)) {
    for (int i = 0; i < 16; ++i) value = value * 31 + ((const int64_t*)param)[i];
  } else {
    memcpy(&value, param, size);
    if (size == 4) value = (int32_t)value;
  }
  return value;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void** extra) {
  const Kernel* kernel = (const Kernel*)function;
  const unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
  const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (x < 1 || x > 2147483647u || y < 1 || y > 65535 || z < 1 || z > 65535)
    REFUSE("%s: grid %u x %u x %u", kernel->name, x, y, z);
  if (threads < 1 || threads > 1024) REFUSE("%s: %u threads", kernel->name, threads);
  if (config->sharedMemBytes > (unsigned)kernel->shared_allowed)
    REFUSE("%s: %u bytes of shared memory of %d", kernel->name, config->sharedMemBytes, kernel->shared_allowed);
  if (kernel->num_params < 0) REFUSE("%s: launched before it was described", kernel->name);
  for (int i = 0; i < kernel->num_params; ++i)
    if (kernel->divisor[i] > 1 && value_of(params[i], kernel->size[i]) % kernel->divisor[i] != 0)
      REFUSE("%s: parameter %d is %lld, and compiled as a multiple of %d", kernel->name, i,
             (long long)value_of(params[i], kernel->size[i]), kernel->divisor[i]);
  ++num_launches;
  if (logged < MAX_LOG) {
    Launch* launch = &launch_log[logged++];
    *launch = (Launch){.grid = {x, y, z}, .threads = threads, .shared = config->sharedMemBytes};
    memcpy(launch->name, kernel->name, sizeof launch->name);
    launch->num_params = kernel->num_params;
    for (int i = 0; i < kernel->num_params; ++i) launch->params[i] = value_of(params[i], kernel->size[i]);
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                        unsigned threads_z, unsigned shared, CUstream stream, void** params, void** extra) {
  const CUlaunchConfig config = {x, y, z, threads, threads_y, threads_z, shared, stream, 0, 0};
  return cuLaunchKernelEx(&config, function, params, extra);
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                       const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
  int wide = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_INT32;
  const unsigned itemsize = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : wide ? 4 : 2, inner = box[0] * itemsize;
  const unsigned span = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 256 * itemsize : 16u << swizzle;
  if ((uintptr_t)map % 64 != 0) REFUSE("tensor map: stored at %p, no multiple of 64", (void*)map);
  if ((uintptr_t)address % 16 != 0) REFUSE("tensor map: address %p, no multiple of 16", address);
  if (rank < 1 || rank > 5) REFUSE("tensor map: rank %u", rank);
  for (unsigned i = 0; i < rank; ++i) {
    if (dims[i] < 1 || dims[i] > 1ull << 32) REFUSE("tensor map: size %llu", (unsigned long long)dims[i]);
    if (box[i] < 1 || box[i] > 256) REFUSE("tensor map: box of %u", box[i]);
    if (element_strides[i] < 1 || element_strides[i] > 8) REFUSE("tensor map: element stride %u", element_strides[i]);
  }
  for (unsigned i = 0; i + 1 < rank; ++i)
    if (strides[i] % 16 != 0 || strides[i] >= 1ull << 40 || strides[i] < dims[0] * itemsize)
      REFUSE("tensor map: stride of %llu bytes", (unsigned long long)strides[i]);
  if (inner % 16 != 0 || inner > span) REFUSE("tensor map: box of %u bytes, swizzled by %u", inner, span);
  memset(map, 0, sizeof *map);
  ((uint64_t*)map)[0] = (uint64_t)address;
  for (unsigned i = 0; i < rank; ++i) {
    ((uint64_t*)map)[1 + i] = dims[i];
    ((uint64_t*)map)[6 + i] = box[i];
    if (i + 1 < rank) ((uint64_t*)map)[11 + i] = strides[i];
  }
  ((uint64_t*)map)[15] = (uint64_t)type | (uint64_t)swizzle << 8 | (uint64_t)promotion << 16 | (uint64_t)fill << 24;
  ++num_tensor_maps;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) { return (*module = (CUmodule)1, CUDA_SUCCESS); }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (num_kernels == MAX_KERNELS) REFUSE("the stub holds %d kernels", MAX_KERNELS);
  Kernel* kernel = &kernels[num_kernels++];
  *kernel = (Kernel){.shared_allowed = SHARED_DEFAULT, .num_params = -1};
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  return (*function = (CUfunction)kernel, CUDA_SUCCESS);
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  return (*value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS);
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > SHARED_LIMIT) REFUSE("%s: %d bytes of shared memory", ((Kernel*)function)->name, value);
    ((Kernel*)function)->shared_allowed = value;
  }
  if (attribute > CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE) REFUSE("attribute %d", attribute);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_LIMIT; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 1000;
  }
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return (*(CUdeviceptr*)data = pointer, CUDA_SUCCESS);  // a CPU tensor's address will do
}
CUresult cuGetErrorString(CUresult error, const char** text) { return (*text = message, CUDA_SUCCESS); }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return (*version = 13000, CUDA_SUCCESS); }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return (*device = ordinal, CUDA_SUCCESS); }
CUresult cuDeviceGetCount(int* count) { return (*count = 1, CUDA_SUCCESS); }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return (*context = (CUcontext)1, CUDA_SUCCESS);
}
CUresult cuCtxGetCurrent(CUcontext* context) { return (*context = (CUcontext)1, CUDA_SUCCESS); }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return (*device = 0, CUDA_SUCCESS); }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return (*value = 0, CUDA_SUCCESS); }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  return (*count = 1, CUDA_SUCCESS);
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return (*status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS);
}
