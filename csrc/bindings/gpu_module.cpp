// Python module `bitsandbytes._gpu`: memory that tensors of torch own but torch does not allocate.
// It needs a GPU runtime and no torch; tensors are handed over as DLPack capsules.
// SPDX-License-Identifier: MIT
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings/dlpack.h"
#include "bitsandbytes/kernels/managed_memory.h"

namespace py = pybind11;
namespace dlpack = bnb::dlpack;

namespace {

// A row of bytes that frees its memory with itself.
struct Bytes {
  dlpack::ManagedTensor exported{};
  int64_t size;

  Bytes(void* start, int64_t bytes, int device) : size(bytes) {
    exported.tensor = {start,
                       bnb::gpu::dlpack_device_type(),
                       device,
                       1,
                       dlpack::kUnsignedInteger,
                       8,
                       /*lanes=*/1,
                       &size,
                       nullptr,
                       0};
    exported.context = this;
    exported.deleter = [](dlpack::ManagedTensor* self) {
      delete static_cast<Bytes*>(self->context);
    };
  }
  ~Bytes() { bnb::gpu::free_managed(exported.tensor.data); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
};

// Whoever takes the tensor renames the capsule; then the tensor is not ours to delete.
void drop_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, dlpack::kTensorCapsule)) return;
  auto* tensor =
      static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kTensorCapsule));
  tensor->deleter(tensor);
}

py::object allocate_managed(int64_t bytes, int device) {
  void* start = nullptr;
  {
    const py::gil_scoped_release unlocked;
    start = bnb::gpu::allocate_managed(bytes, device);
  }
  if (start == nullptr) return py::none();
  auto owner = std::make_unique<Bytes>(start, bytes, device);
  py::capsule capsule(&owner->exported, dlpack::kTensorCapsule, &drop_capsule);
  owner.release();
  return capsule;
}

void prefetch_managed(const std::vector<uintptr_t>& starts, bool to_cpu, uintptr_t stream) {
  const auto destination = to_cpu ? bnb::gpu::Destination::kHost : bnb::gpu::Destination::kDevice;
  bnb::gpu::prefetch_managed(starts, destination, {reinterpret_cast<void*>(stream)});
}

}  // namespace

PYBIND11_MODULE(_gpu, m) {
  m.doc() = "GPU memory that tensors own and torch does not allocate.";
  py::class_<bnb::gpu::ManagedSupport>(m, "ManagedSupport", "What a device offers.")
      .def_readonly("memory", &bnb::gpu::ManagedSupport::memory)
      .def_readonly("prefetch", &bnb::gpu::ManagedSupport::prefetch);
  m.def("managed_support", &bnb::gpu::managed_support, py::arg("device"),
        "What the device offers in managed memory.");
  m.def("allocate_managed", &allocate_managed, py::arg("bytes"), py::arg("device"),
        "A DLPack capsule of bytes in managed memory that frees itself, or None if there is none.");
  m.def(
      "is_managed",
      [](uintptr_t start) { return bnb::gpu::is_managed(reinterpret_cast<void*>(start)); },
      py::arg("start"), "Whether an address is the start of managed memory allocated here.");
  m.def("managed_bytes", &bnb::gpu::managed_bytes, py::arg("device"),
        "Bytes of managed memory that are allocated for the device.");
  m.def("prefetch_managed", &prefetch_managed, py::arg("starts"), py::arg("to_cpu"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Moves allocations to their device or to the host, in the order of the stream.");
}
