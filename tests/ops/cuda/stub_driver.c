/* libcuda.so.1 for a machine without a card: what fbn_plugin/ops/cuda/driver.py asks for, with an H100's answers.
   It checks what arrives, so that the real cuda-bindings are seen to pass it on. */
#include <string.h>

void* dlsym(void*, const char*);
static void* current = 0;

int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int* version) { return *version = VERSION, 0; }
int cuDeviceGet(int* device, int index) { return *device = 100 + index, index ? 101 : 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  static const int answers[][2] = {{75, 9}, {76, 0}, {16, 132}, {97, 232448}, {81, 233472}, {111, 1024},
                                   {82, 65536}, {39, 2048}, {106, 32}, {38, 52428800}};
  for (int i = 0; i < 10; i++)
    if (answers[i][0] == attribute) return *value = answers[i][1], device != 100;
  return 1;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)0x1000, device != 100; }
int cuCtxPushCurrent_v2(void* context) { return current = context, 0; }
int cuCtxPopCurrent_v2(void** context) { return *context = current, current = 0, 0; }
int cuCtxGetCurrent(void** context) { return *context = current, 0; }
int cuCtxSetCurrent(void* context) { return current = context, 0; }
int cuGetErrorName(int error, const char** name) { return *name = error == 201 ? "CUDA_ERROR_INVALID_CONTEXT" : 0, 0; }
int cuThreadExchangeStreamCaptureMode(int* mode) { return *mode = 0, 0; }
int cuModuleLoadData(void** module, const void* image) {
  if (current != (void*)0x1000) return 201;
  return *module = (void*)0x2000, memcmp(image, "\177ELF", 4) ? 200 : 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (module != (void*)0x2000) return 400;
  if (strcmp(name, "forward")) return 500;
  return *function = (void*)0x7ffff0003000, 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 1 ? 1088 : attribute == 4 ? 60 : attribute == 3 ? 0 : -1;
  return function != (void*)0x7ffff0003000;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  return !(function == (void*)0x7ffff0003000 &&
           ((attribute == 8 && value == 232448 - 1088) || (attribute == 9 && value == 100)));
}
static int launch(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                  void* stream, void** params) {
  if (!current && stream == (void*)0x4000) return 201;
  return f == (void*)0x7ffff0003000 && gx == 2147483647 && gy == 1 && gz == 1 && bx == 512 && by == 1 && bz == 1 &&
                 shared == 4096 && (stream == (void*)0x4000 || stream == (void*)0x7ffff0005000) && **(int**)params == 77
             ? 0 : 1;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** params, void** extra) {
  return extra ? 1 : launch(f, gx, gy, gz, bx, by, bz, shared, stream, params);
}
int cuLaunchCooperativeKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, void* stream, void** params) {
  return launch(f, gx, gy, gz, bx, by, bz, shared, stream, params);
}
static int no_such_function(void) { return 801; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* status) {
  static char with_suffix[256];
  strcat(strcpy(with_suffix, name), "_v2");
  *function = dlsym(0, with_suffix);
  if (!*function) *function = dlsym(0, name);
  if (!*function) *function = (void*)no_such_function;
  if (status) *status = 0;
  return 0;
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
