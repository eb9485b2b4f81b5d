// Stand-in for the NVIDIA driver's library on a build machine that has none. It lets TVM's CUDA
// runtime load; every function fails with CUDA_ERROR_STUB_LIBRARY, as NVIDIA's own stubs do.
namespace {
constexpr int kStubLibrary = 34;
}

extern "C" {
int cuDeviceGetName() { return kStubLibrary; }
int cuFuncSetAttribute() { return kStubLibrary; }
int cuGetErrorName() { return kStubLibrary; }
int cuGetErrorString() { return kStubLibrary; }
int cuLaunchKernelEx() { return kStubLibrary; }
int cuModuleGetFunction() { return kStubLibrary; }
int cuModuleLoadData() { return kStubLibrary; }
int cuModuleUnload() { return kStubLibrary; }
int cuTensorMapEncodeTiled() { return kStubLibrary; }
}
