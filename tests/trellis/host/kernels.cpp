// The kernels of SOURCE for run.cpp: thread_NAME is one thread of NAME.

#include "common.cuh"
#include SOURCE

template <class Parameters>
static void call(void (*kernel)(Parameters), const void *parameter) {
    kernel(*(const Parameters *)parameter);
}

#define THREAD(name) \
    extern "C" void thread_##name(const void *parameter) { call(name, parameter); }
KERNELS
