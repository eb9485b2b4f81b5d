// AMD GPUs for TVM's runtime, which comes without: memory, copies and streams (DeviceAPI "rocm"),
// and the loader of modules of kind "hip", which launches their kernels.
//
// Compiled on first use against the headers of the installed tvm and tvm_ffi. The HIP library is
// opened by name at run time, so that nothing of ROCm is needed to compile, and declared here as far
// as it is used. Of HIP only what has been the same from version 5.2 to 7 is used.

#include <dlfcn.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

namespace ffi = tvm::ffi;
using tvm::Device;

constexpr int kMaxDevices = 64;

// From hip_runtime_api.h.
enum { kHostToHost = 0, kHostToDevice = 1, kDeviceToHost = 2, kDeviceToDevice = 3 };
enum {
  kAttrCapabilityMajor = 23,
  kAttrCapabilityMinor = 61,
  kAttrMaxThreadsPerBlock = 56,
  kAttrMaxSharedMemoryPerBlock = 74,
  kAttrMultiprocessorCount = 63,
  kAttrWarpSize = 87,
};
void* const kLaunchBufferPointer = reinterpret_cast<void*>(1);
void* const kLaunchBufferSize = reinterpret_cast<void*>(2);
void* const kLaunchEnd = reinterpret_cast<void*>(3);

// The functions of the HIP library, opened by the one that loads this plugin.
struct Hip {
  const char* (*hipGetErrorString)(int);
  int (*hipGetDeviceCount)(int*);
  int (*hipSetDevice)(int);
  int (*hipGetDevice)(int*);
  int (*hipDeviceGetAttribute)(int*, int, int);
  int (*hipMalloc)(void**, size_t);
  int (*hipFree)(void*);
  int (*hipMemcpy)(void*, const void*, size_t, int);
  int (*hipMemcpyAsync)(void*, const void*, size_t, int, void*);
  int (*hipMemcpyPeerAsync)(void*, int, const void*, int, size_t, void*);
  int (*hipStreamCreateWithFlags)(void**, unsigned);
  int (*hipStreamDestroy)(void*);
  int (*hipStreamSynchronize)(void*);
  int (*hipStreamWaitEvent)(void*, void*, unsigned);
  int (*hipEventCreateWithFlags)(void**, unsigned);
  int (*hipEventRecord)(void*, void*);
  int (*hipEventDestroy)(void*);
  int (*hipModuleLoadData)(void**, const void*);
  int (*hipModuleUnload)(void*);
  int (*hipModuleGetFunction)(void**, void*, const char*);
  int (*hipModuleLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                               unsigned, void*, void**, void**);
};

Hip hip;

void Check(int status, const char* what) {
  if (status != 0) {
    TVM_FFI_THROW(RuntimeError) << what << " failed: " << hip.hipGetErrorString(status);
  }
}

#define HIP_CALL(function, ...) Check(hip.function(__VA_ARGS__), #function)

class RocmDeviceAPI final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(Device device) final { HIP_CALL(hipSetDevice, device.device_id); }

  void GetAttr(Device device, tvm::runtime::DeviceAttrKind kind, ffi::Any* result) final {
    switch (kind) {
      case tvm::runtime::kExist: {
        int count = 0;
        *result = hip.hipGetDeviceCount(&count) == 0 && device.device_id < count ? 1 : 0;
        return;
      }
      case tvm::runtime::kMaxThreadsPerBlock:
        *result = Attribute(device, kAttrMaxThreadsPerBlock);
        return;
      case tvm::runtime::kWarpSize:
        *result = Attribute(device, kAttrWarpSize);
        return;
      case tvm::runtime::kMaxSharedMemoryPerBlock:
        *result = Attribute(device, kAttrMaxSharedMemoryPerBlock);
        return;
      case tvm::runtime::kMultiProcessorCount:
        *result = Attribute(device, kAttrMultiprocessorCount);
        return;
      case tvm::runtime::kComputeVersion:
        *result = ffi::String(std::to_string(Attribute(device, kAttrCapabilityMajor)) + "." +
                              std::to_string(Attribute(device, kAttrCapabilityMinor)));
        return;
      default:
        return;  // not known: no value
    }
  }

  void* AllocDataSpace(Device device, size_t nbytes, size_t alignment, DLDataType) final {
    // HIP aligns to 256 bytes or more.
    SetDevice(device);
    void* memory = nullptr;
    HIP_CALL(hipMalloc, &memory, nbytes);
    return memory;
  }

  void FreeDataSpace(Device device, void* memory) final {
    SetDevice(device);
    HIP_CALL(hipFree, memory);
  }

  tvm::runtime::DeviceAPI* AsBase() { return this; }

  TVMStreamHandle CreateStream(Device device) final {
    SetDevice(device);
    void* stream = nullptr;
    HIP_CALL(hipStreamCreateWithFlags, &stream, 0);
    return stream;
  }

  void FreeStream(Device device, TVMStreamHandle stream) final {
    SetDevice(device);
    HIP_CALL(hipStreamDestroy, stream);
  }

  void StreamSync(Device device, TVMStreamHandle stream) final {
    SetDevice(device);
    HIP_CALL(hipStreamSynchronize, stream);
  }

  void SyncStreamFromTo(Device device, TVMStreamHandle from, TVMStreamHandle to) final {
    SetDevice(device);
    void* event = nullptr;
    HIP_CALL(hipEventCreateWithFlags, &event, 2);  // without timing
    HIP_CALL(hipEventRecord, event, from);
    HIP_CALL(hipStreamWaitEvent, to, event, 0);
    HIP_CALL(hipEventDestroy, event);
  }

  bool SupportsDevicePointerArithmeticsOnHost() final { return true; }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t nbytes, Device from_device, Device to_device, DLDataType,
                      TVMStreamHandle stream) final {
    const void* source = static_cast<const char*>(from) + from_offset;
    void* target = static_cast<char*>(to) + to_offset;
    bool from_gpu = from_device.device_type == kDLROCM, to_gpu = to_device.device_type == kDLROCM;
    SetDevice(from_gpu ? from_device : to_device);
    if (from_gpu && to_gpu && from_device.device_id != to_device.device_id) {
      HIP_CALL(hipMemcpyPeerAsync, target, to_device.device_id, source, from_device.device_id,
               nbytes, stream);
      return;
    }
    int kind = from_gpu ? (to_gpu ? kDeviceToDevice : kDeviceToHost)
                        : (to_gpu ? kHostToDevice : kHostToHost);
    if (stream != nullptr) {
      HIP_CALL(hipMemcpyAsync, target, source, nbytes, kind, stream);
    } else {
      HIP_CALL(hipMemcpy, target, source, nbytes, kind);
    }
  }

 private:
  static int Attribute(Device device, int attribute) {
    int value = 0;
    HIP_CALL(hipDeviceGetAttribute, &value, attribute, device.device_id);
    return value;
  }
};

// What TVM says of a kernel: its arguments, and which launch dimension each number after them is.
struct KernelInfo {
  std::vector<DLDataType> arguments;
  std::vector<int> dimensions;  // 0-2 of the grid, 3-5 of the block
  bool dynamic_shared = false;  // a last number: bytes of it
};

// Reads TVM's serialized modules: numbers little-endian, lengths in 8 bytes before what they count.
class Reader {
 public:
  explicit Reader(const ffi::Bytes& bytes) : at_(bytes.data()), end_(at_ + bytes.size()) {}

  void Raw(void* to, size_t size) {
    if (static_cast<size_t>(end_ - at_) < size) {
      TVM_FFI_THROW(ValueError) << "the kernels in this library are damaged; build it again";
    }
    std::memcpy(to, at_, size);
    at_ += size;
  }

  uint64_t Length() {
    uint64_t length;
    Raw(&length, sizeof(length));
    return length;
  }

  std::string String() {
    std::string text(Bounded(Length()), '\0');
    Raw(&text[0], text.size());
    return text;
  }

  // A length that is still to be found in the rest.
  size_t Bounded(uint64_t length) {
    if (length > static_cast<uint64_t>(end_ - at_)) {
      TVM_FFI_THROW(ValueError) << "the kernels in this library are damaged; build it again";
    }
    return length;
  }

 private:
  const char* at_;
  const char* end_;
};

KernelInfo ReadKernel(Reader* reader) {
  KernelInfo info;
  reader->String();  // its name once more
  info.arguments.resize(reader->Bounded(reader->Length()));
  for (DLDataType& dtype : info.arguments) {
    uint8_t fields[4];
    reader->Raw(fields, 4);
    dtype.code = fields[0];
    dtype.bits = fields[1];
    std::memcpy(&dtype.lanes, fields + 2, 2);
  }
  for (uint64_t i = reader->Length(); i > 0; --i) {
    std::string tag = reader->String();
    if (tag.rfind("blockIdx.", 0) == 0) {
      info.dimensions.push_back(tag[9] - 'x');
    } else if (tag.rfind("threadIdx.", 0) == 0) {
      info.dimensions.push_back(3 + tag[10] - 'x');
    } else if (tag == "tirx.use_dyn_shared_memory") {
      info.dynamic_shared = true;
    } else {
      TVM_FFI_THROW(ValueError) << "AMD GPUs have no launch parameter " << tag;
    }
  }
  for (uint64_t i = reader->Length(); i > 0; --i) {
    int32_t tag;
    reader->Raw(&tag, sizeof(tag));
    if (tag != 0) TVM_FFI_THROW(ValueError) << "AMD GPUs have no kernel argument of kind " << tag;
  }
  return info;
}

class HipModule final : public ffi::ModuleObj {
 public:
  explicit HipModule(const ffi::Bytes& bytes) : bytes_(bytes) {
    Reader reader(bytes_);
    reader.String();  // the format, "hsaco"
    for (uint64_t i = reader.Length(); i > 0; --i) {
      std::string name = reader.String();
      kernels_[name] = ReadKernel(&reader);
    }
    code_ = reader.String();
  }

  const char* kind() const final { return "hip"; }

  int GetPropertyMask() const final {
    return ffi::Module::kBinarySerializable | ffi::Module::kRunnable;
  }

  ffi::Bytes SaveToBytes() const final { return bytes_; }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final;

  // The kernel on a device, whose code is loaded there with the first of its kernels.
  void* Load(int device, const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (modules_.at(device) == nullptr) {
      HIP_CALL(hipModuleLoadData, &modules_[device], code_.data());
    }
    void* function = nullptr;
    HIP_CALL(hipModuleGetFunction, &function, modules_[device], name.c_str());
    return function;
  }

 private:
  ffi::Bytes bytes_;
  std::map<std::string, KernelInfo> kernels_;
  std::string code_;
  // Never unloaded: at the end of the process the HIP library may be gone before this.
  std::array<void*, kMaxDevices> modules_{};
  std::mutex mutex_;
};

// Calls a kernel: its arguments, then its launch dimensions.
class Launcher {
 public:
  Launcher(ffi::ObjectPtr<HipModule> module, std::string name, KernelInfo info)
      : module_(std::move(module)), name_(std::move(name)), info_(std::move(info)) {}

  void operator()(ffi::PackedArgs args, ffi::Any*) const {
    int device;
    HIP_CALL(hipGetDevice, &device);
    void*& function = functions_.at(device);
    if (function == nullptr) function = module_->Load(device, name_);

    const TVMFFIAny* values = reinterpret_cast<const TVMFFIAny*>(args.data());
    size_t count = info_.arguments.size();
    // As a C struct of the arguments, which is how the kernel reads them.
    std::vector<char> packed(8 * count + 8);
    size_t size = 0;
    for (size_t i = 0; i < count; ++i) {
      DLDataType dtype = info_.arguments[i];
      size_t bytes = dtype.bits / 8;
      size = (size + bytes - 1) / bytes * bytes;
      if (dtype.code == kDLFloat && bytes == 4) {
        float value = static_cast<float>(values[i].v_float64);
        std::memcpy(&packed[size], &value, bytes);
      } else {
        // The low bytes of a number come first.
        std::memcpy(&packed[size], &values[i].v_int64, bytes);
      }
      size += bytes;
    }
    size_t work[6] = {1, 1, 1, 1, 1, 1};
    for (size_t i = 0; i < info_.dimensions.size(); ++i) {
      int64_t length = values[count + i].v_int64;
      if (length > 1) work[info_.dimensions[i]] = length;
    }
    size_t shared = info_.dynamic_shared ? values[count + info_.dimensions.size()].v_int64 : 0;
    void* config[] = {kLaunchBufferPointer, packed.data(), kLaunchBufferSize, &size, kLaunchEnd};
    int status = hip.hipModuleLaunchKernel(function, work[0], work[1], work[2], work[3], work[4],
                                           work[5], shared, TVMFFIEnvGetStream(kDLROCM, device),
                                           nullptr, config);
    if (status != 0) {
      TVM_FFI_THROW(RuntimeError) << "launching " << name_
                                  << " failed: " << hip.hipGetErrorString(status);
    }
  }

 private:
  ffi::ObjectPtr<HipModule> module_;
  std::string name_;
  KernelInfo info_;
  mutable std::array<void*, kMaxDevices> functions_{};
};

ffi::Optional<ffi::Function> HipModule::GetFunction(const ffi::String& name) {
  auto found = kernels_.find(name);
  if (found == kernels_.end()) return std::nullopt;
  auto self = ffi::details::ObjectUnsafe::ObjectPtrFromUnowned<HipModule>(this);
  Launcher launcher(self, found->first, found->second);
  return ffi::Function::FromPacked(
      [launcher](ffi::PackedArgs args, ffi::Any* result) { launcher(args, result); });
}

RocmDeviceAPI api;

}  // namespace

// Opens the HIP library `path` and registers everything with TVM. Returns nullptr, or what is wrong.
extern "C" const char* shardwright_rocm_load(const char* path) {
  static std::string error;
  void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) return dlerror();
#define HIP_FIND(name)                                                        \
  hip.name = reinterpret_cast<decltype(hip.name)>(dlsym(library, #name));     \
  if (hip.name == nullptr) {                                                  \
    error = std::string(path) + " has no function " #name;                    \
    return error.c_str();                                                     \
  }
  HIP_FIND(hipGetErrorString)
  HIP_FIND(hipGetDeviceCount)
  HIP_FIND(hipSetDevice)
  HIP_FIND(hipGetDevice)
  HIP_FIND(hipDeviceGetAttribute)
  HIP_FIND(hipMalloc)
  HIP_FIND(hipFree)
  HIP_FIND(hipMemcpy)
  HIP_FIND(hipMemcpyAsync)
  HIP_FIND(hipMemcpyPeerAsync)
  HIP_FIND(hipStreamCreateWithFlags)
  HIP_FIND(hipStreamDestroy)
  HIP_FIND(hipStreamSynchronize)
  HIP_FIND(hipStreamWaitEvent)
  HIP_FIND(hipEventCreateWithFlags)
  HIP_FIND(hipEventRecord)
  HIP_FIND(hipEventDestroy)
  HIP_FIND(hipModuleLoadData)
  HIP_FIND(hipModuleUnload)
  HIP_FIND(hipModuleGetFunction)
  HIP_FIND(hipModuleLaunchKernel)
  auto device_api = ffi::Function::FromPacked([](ffi::PackedArgs, ffi::Any* result) {
    *result = static_cast<void*>(api.AsBase());
  });
  ffi::Function::SetGlobal("device_api.rocm", device_api, true);
  ffi::Function::SetGlobal("ffi.Module.load_from_bytes.hip",
                           ffi::Function::FromTyped([](const ffi::Bytes& bytes) {
                             return ffi::Module(ffi::make_object<HipModule>(bytes));
                           }),
                           true);
  return nullptr;
}
