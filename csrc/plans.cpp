// Launch plans: what a known kind of call allocates and launches (kernels/launch.py makes them), in one op instead of
// some hundred steps of Python. Tested against a stub driver (tests/aot/test_host.py); it has never run on a GPU.
//
//   plan_keep(variant, tensors, program)    keeps a program for calls of this variant on tensors of this kind
//   plan_run(variant, tensors)              runs it: the tensors it returns, or none where no program is kept
//   plan_counters(counters, stream)         the zeros that kernels on this stream count on
//
// A program holds kernels, sizes and constants, never a tensor or an address of one. It is
//   [results, flags, allocations ..., launches ...]   with their numbers in front; flags: 1 it counts, 2 for eager calls only
//   allocation: dtype, dimensions, sizes ...    the first `results` are returned, what is left is a workspace
//   launch: kernel, grid x, y, z, threads, shared bytes, parameters, tensor maps
//   parameter: register, offset; or -1, bits; or -2, which tensor map
//   tensor map: register, offset, swizzle, type, fill, dimensions, (size, stride in bytes, box) ... innermost first
// Registers are the addresses of the tensors given (None has none), of the allocations, and of the counters.
//
// The driver is called through pointers found at run time: the object builds and loads without CUDA.
#include "ops.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

// Weak: absent from CPU builds of torch, on which the shared object must load all the same.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastlora {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<std::optional<Tensor>>;
using Key = std::vector<int64_t>;

constexpr size_t kMaxPlans = 8192;
constexpr size_t kMaxParams = 128, kMaxMaps = 4, kMaxDimensions = 5;
constexpr int64_t kConstant = -1, kTensorMap = -2;
constexpr int kPromoteTo128Bytes = 2;  // CU_TENSOR_MAP_L2_PROMOTION_L2_128B, as Triton asks for
constexpr int kInvalidContext = 201;  // CUDA_ERROR_INVALID_CONTEXT: a thread that has not used the device yet

struct Driver {
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*is_capturing)(void*, int*);
  int (*error_string)(int, const char**);
  int (*retain)(void**, int);
  int (*set_current)(void*);
  int (*encode)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, int, int,
                int, int);

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

 private:
  template <typename Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(library == nullptr ? nullptr : dlsym(library, name));
    STD_TORCH_CHECK(function != nullptr, "fastlora::plan_run: the CUDA driver has no ", name);
  }

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    find(library, "cuLaunchKernel", launch);
    find(library, "cuStreamIsCapturing", is_capturing);
    find(library, "cuGetErrorString", error_string);
    find(library, "cuDevicePrimaryCtxRetain", retain);
    find(library, "cuCtxSetCurrent", set_current);
    find(library, "cuTensorMapEncodeTiled", encode);
  }
};

struct Param {
  int64_t reg;  // or kConstant, or kTensorMap
  int64_t value;
};

struct TensorMap {
  int64_t reg, offset;
  int swizzle, type, fill;
  uint32_t dimensions;
  uint64_t sizes[kMaxDimensions], strides[kMaxDimensions];
  uint32_t box[kMaxDimensions];
};

struct alignas(64) Encoded {
  unsigned char bytes[128];
};

struct Launch {
  void* kernel;
  unsigned grid[3], threads, shared;
  std::vector<Param> params;
  std::vector<TensorMap> maps;
};

struct Allocation {
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
};

struct Plan {
  size_t results;
  bool counts, eager;
  std::vector<Allocation> allocations;
  std::vector<Launch> launches;
};

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = key.size();
    for (int64_t number : key) hash = (hash ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15ull, hash ^= hash >> 29;
    return hash;
  }
};

struct Counters {
  int32_t device;
  int64_t stream;
  int64_t address;
};

std::shared_mutex mutex;
std::unordered_map<Key, std::shared_ptr<const Plan>, Hash> plans;
std::vector<Counters> counters;

struct Device {
  int32_t type = 0, index = -1;
  explicit Device(const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    aoti_torch_get_device_type(tensor->get(), &type);
    index = tensor->get_device_index();
  }
  bool cuda() const { return type == aoti_torch_device_type_cuda(); }
};

// Appends to `key` what Triton and the launchers' rules ask of the tensors: sizes, strides, dtypes, alignment to 16
// bytes, which are one tensor, devices. False where one is empty.
bool describe(int64_t variant, const Tensors& tensors, Key& key, std::vector<int64_t>& registers) {
  key.push_back(variant);
  for (const auto& one : tensors) {
    if (!one) {
      key.push_back(-1);
      continue;
    }
    const auto sizes = one->sizes(), strides = one->strides();
    const int64_t address = reinterpret_cast<int64_t>(one->data_ptr());
    if (address == 0) return false;
    int32_t dtype = 0;
    const Device device(one);
    aoti_torch_get_dtype(one->get(), &dtype);
    const auto same = std::find(registers.begin(), registers.end(), address) - registers.begin();
    key.push_back(static_cast<int64_t>(sizes.size()) | dtype << 8 | (address & 15) << 16 | same << 24);
    key.push_back(static_cast<int64_t>(device.type) << 32 | static_cast<uint32_t>(device.index));
    key.insert(key.end(), sizes.begin(), sizes.end());
    key.insert(key.end(), strides.begin(), strides.end());
    registers.push_back(address);
  }
  return !registers.empty();
}

// Null where memory is short.
AtenTensorHandle allocate(const Allocation& like, const Device& device) {
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch_empty_strided(like.sizes.size(), like.sizes.data(), like.strides.data(), like.dtype,
                                              device.type, device.index, &handle);
  return error == 0 ? handle : nullptr;
}

void check(int error, const char* what) {
  if (error == 0) return;
  const char* text = nullptr;
  Driver::get().error_string(error, &text);
  STD_TORCH_CHECK(false, "fastlora::plan_run: ", what, ": ", text == nullptr ? "?" : text);
}

void launch(const Launch& one, const std::vector<int64_t>& registers, void* stream, const Device& device) {
  const Driver& driver = Driver::get();
  Encoded maps[kMaxMaps];
  for (size_t i = 0; i < one.maps.size(); ++i) {
    static constexpr uint32_t kOnes[kMaxDimensions] = {1, 1, 1, 1, 1};
    const TensorMap& map = one.maps[i];
    void* address = reinterpret_cast<void*>(registers[map.reg] + map.offset);
    check(driver.encode(&maps[i], map.type, map.dimensions, address, map.sizes, map.strides, map.box, kOnes, 0,
                        map.swizzle, kPromoteTo128Bytes, map.fill),
          "a tensor map was refused");
  }
  int64_t values[kMaxParams];
  void* params[kMaxParams];
  for (size_t i = 0; i < one.params.size(); ++i) {
    const Param& param = one.params[i];
    values[i] = param.reg < 0 ? param.value : registers[param.reg] + param.value;
    params[i] = param.reg == kTensorMap ? static_cast<void*>(&maps[param.value]) : &values[i];
  }
  const auto call = [&] {
    const unsigned* grid = one.grid;
    return driver.launch(one.kernel, grid[0], grid[1], grid[2], one.threads, 1, 1, one.shared, stream, params, nullptr);
  };
  int error = call();
  if (error == kInvalidContext && device.cuda()) {
    void* context = nullptr;
    if (driver.retain(&context, device.index) == 0 && driver.set_current(context) == 0) error = call();
  }
  check(error, "a kernel was not launched");
}

std::vector<Tensor> run(int64_t variant, Tensors tensors) {
  thread_local Key key;
  thread_local std::vector<int64_t> registers;
  key.clear();
  registers.clear();
  if (tensors.empty() || !describe(variant, tensors, key, registers)) return {};
  const Device device(tensors.front());
  std::shared_ptr<const Plan> plan;
  void* stream = nullptr;
  if (device.cuda()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                        aoti_torch_get_current_cuda_stream(device.index, &stream) == 0,
                    "fastlora::plan_run: torch gave no current stream for CUDA device ", device.index);
  }
  int64_t counts_on = 0;
  {
    std::shared_lock lock(mutex);
    const auto found = plans.find(key);
    if (found == plans.end()) return {};
    plan = found->second;
    if (plan->counts) {
      for (const Counters& one : counters) {
        if (one.device == device.index && one.stream == reinterpret_cast<int64_t>(stream)) counts_on = one.address;
      }
    }
  }
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (device.cuda()) guard.emplace(device.index);
  if (plan->counts && counts_on == 0) return {};
  if (plan->counts || plan->eager) {
    int capturing = 0;
    // A graph has counters of its own, which Python makes.
    if (Driver::get().is_capturing(stream, &capturing) != 0 || capturing != 0) return {};
  }
  std::vector<Tensor> made;
  made.reserve(plan->allocations.size());
  for (const Allocation& one : plan->allocations) {
    const AtenTensorHandle handle = allocate(one, device);
    if (handle == nullptr) return {};  // the call without this op says so, by torch's own error
    made.emplace_back(handle);
    registers.push_back(reinterpret_cast<int64_t>(made.back().data_ptr()));
  }
  registers.push_back(counts_on);
  for (const Launch& one : plan->launches) launch(one, registers, stream, device);
  made.resize(plan->results, made.front());  // the workspace may be used again by what follows on the stream
  return made;
}

void keep(int64_t variant, Tensors tensors, std::vector<int64_t> program) {
  Key key;
  std::vector<int64_t> registers;
  if (tensors.empty() || !tensors.front() || !describe(variant, tensors, key, registers)) return;
  size_t at = 0;
  const auto next = [&] {
    STD_TORCH_CHECK(at < program.size(), "fastlora::plan_keep: the program ends early");
    return program[at++];
  };
  auto plan = std::make_shared<Plan>();
  plan->results = next();
  const int64_t flags = next();
  plan->counts = (flags & 1) != 0;
  plan->eager = (flags & 2) != 0;
  plan->allocations.resize(next());
  for (Allocation& one : plan->allocations) {
    one.dtype = static_cast<int32_t>(next());
    one.sizes.resize(next());
    for (int64_t& size : one.sizes) size = next();
    one.strides.assign(one.sizes.size(), 1);
    for (size_t i = one.sizes.size(); i-- > 1;) one.strides[i - 1] = one.strides[i] * std::max<int64_t>(one.sizes[i], 1);
  }
  const int64_t last = static_cast<int64_t>(registers.size() + plan->allocations.size());
  plan->launches.resize(next());
  for (Launch& one : plan->launches) {
    one.kernel = reinterpret_cast<void*>(next());
    for (unsigned& size : one.grid) size = static_cast<unsigned>(next());
    one.threads = static_cast<unsigned>(next());
    one.shared = static_cast<unsigned>(next());
    one.params.resize(next());
    one.maps.resize(next());
    STD_TORCH_CHECK(one.params.size() <= kMaxParams && one.maps.size() <= kMaxMaps,
                    "fastlora::plan_keep: too many parameters");
    for (Param& param : one.params) {
      param.reg = next();
      param.value = next();
      STD_TORCH_CHECK(param.reg <= last, "fastlora::plan_keep: there is no register ", param.reg);
    }
    for (TensorMap& map : one.maps) {
      map.reg = next();
      map.offset = next();
      map.swizzle = static_cast<int>(next());
      map.type = static_cast<int>(next());
      map.fill = static_cast<int>(next());
      map.dimensions = static_cast<uint32_t>(next());
      STD_TORCH_CHECK(map.reg >= 0 && map.reg <= last && map.dimensions <= kMaxDimensions,
                      "fastlora::plan_keep: not a tensor map");
      for (uint32_t i = 0; i < map.dimensions; ++i) {
        map.sizes[i] = next();
        map.strides[i] = next();
        map.box[i] = static_cast<uint32_t>(next());
      }
    }
  }
  STD_TORCH_CHECK(at == program.size() && plan->results >= 1 && plan->results <= plan->allocations.size(),
                  "fastlora::plan_keep: not a program");
  std::unique_lock lock(mutex);
  if (plans.size() >= kMaxPlans) plans.clear();
  plans[key] = plan;
}

void keep_counters(Tensor zeros, int64_t stream) {
  std::unique_lock lock(mutex);
  const Counters made{zeros.get_device_index(), stream, reinterpret_cast<int64_t>(zeros.data_ptr())};
  counters.push_back(made);
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora, m) {
  m.def("plan_run(int variant, Tensor?[] tensors) -> Tensor[]");
  m.def("plan_keep(int variant, Tensor?[] tensors, int[] program) -> ()");
  m.def("plan_counters(Tensor counters, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CompositeExplicitAutograd, m) {
  m.impl("plan_run", TORCH_BOX(&fastlora::run));
  m.impl("plan_keep", TORCH_BOX(&fastlora::keep));
  m.impl("plan_counters", TORCH_BOX(&fastlora::keep_counters));
}
