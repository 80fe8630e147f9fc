// What of DLPack we read: a framework's tensors as they lie, through the table of functions that the type of its tensors keeps in
// `__dlpack_c_exchange_api__`. The layout is DLPack's (github.com/dmlc/dlpack, version 1.3), fixed while its major version is 1.
#pragma once

#include <stdint.h>

namespace dlpack {

constexpr uint32_t MAJOR = 1;
constexpr const char* CAPSULE = "dlpack_exchange_api";
constexpr int32_t CPU = 1;
enum Code : uint8_t { INT = 0, FLOAT = 2, BFLOAT = 4 };

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ExchangeApi {
    uint32_t major, minor;
    const ExchangeApi* previous;
    void *allocate, *export_owned, *import_owned;
    int (*describe)(void* object, Tensor* out);  // may be null; not 0: a Python error is set. `out` borrows from `object`
    void* current_stream;
};

}  // namespace dlpack
