// What every op of this folder starts from: PyTorch's stable ABI, pinned to 2.11.
//
// Only headers of torch/csrc/stable are used, so one shared object runs on every torch from 2.11 on, with or without
// CUDA, for every Python. Two of its macros are avoided: STD_CUDA_CHECK and STD_CUDA_KERNEL_LAUNCH_CHECK need symbols
// that a CPU build of torch lacks, and the object must load there too.
#pragma once

#ifndef TORCH_TARGET_VERSION
#error "compile with -DTORCH_TARGET_VERSION=... (fastlora/runtime/build.py does)"
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
