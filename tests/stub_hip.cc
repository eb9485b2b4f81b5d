// A HIP library without a GPU: device memory is the host's, and a launch is only written down.
// The architecture is that of the variable STUB_HIP_ARCH.

#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {

unsigned stub_grid[3], stub_block[3], stub_shared;
char stub_arguments[256];
size_t stub_size;
char stub_kernel[128];

const char* hipGetErrorString(int) { return "stub error"; }
int hipGetDeviceCount(int* count) { return *count = 2, 0; }
int hipSetDevice(int) { return 0; }
int hipGetDevice(int* device) { return *device = 0, 0; }
int hipDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute, 0; }
int hipGetDevicePropertiesR0600(char* properties, int) {
  std::strcpy(properties, "A GPU");
  std::snprintf(properties + 1160, 64, "%s:sramecc+:xnack-", std::getenv("STUB_HIP_ARCH"));
  return 0;
}
int hipMalloc(void** memory, size_t size) { return (*memory = std::malloc(size)) ? 0 : 2; }
int hipFree(void* memory) { return std::free(memory), 0; }
int hipMemcpy(void* to, const void* from, size_t size, int) {
  return std::memcpy(to, from, size), 0;
}
int hipMemcpyAsync(void* to, const void* from, size_t size, int, void*) {
  return std::memcpy(to, from, size), 0;
}
int hipMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, void*) {
  return std::memcpy(to, from, size), 0;
}
int hipStreamCreateWithFlags(void** stream, unsigned) { return *stream = std::malloc(1), 0; }
int hipStreamDestroy(void* stream) { return std::free(stream), 0; }
int hipStreamSynchronize(void*) { return 0; }
int hipStreamWaitEvent(void*, void*, unsigned) { return 0; }
int hipEventCreateWithFlags(void** event, unsigned) { return *event = std::malloc(1), 0; }
int hipEventRecord(void*, void*) { return 0; }
int hipEventDestroy(void* event) { return std::free(event), 0; }
int hipModuleLoadData(void** module, const void* image) {
  return *module = const_cast<void*>(image), std::memcmp(image, "\x7f" "ELF", 4) ? 209 : 0;
}
int hipModuleUnload(void*) { return 0; }
int hipModuleGetFunction(void** function, void*, const char* name) {
  return *function = strdup(name), 0;
}
#ifndef STUB_WITHOUT_LAUNCH
int hipModuleLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void*, void**, void** extra) {
  stub_grid[0] = gx, stub_grid[1] = gy, stub_grid[2] = gz;
  stub_block[0] = bx, stub_block[1] = by, stub_block[2] = bz;
  stub_shared = shared;
  stub_size = *static_cast<size_t*>(extra[3]);
  std::memcpy(stub_arguments, extra[1], stub_size);
  std::strcpy(stub_kernel, static_cast<char*>(function));
  return 0;
}
#endif
}
