// Python bindings. Arrays come in as NumPy arrays of exactly these types; fastlocal/engine/_native.py converts.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "bn_act.h"
#include "graph_executor.h"
#include "scheduler.h"

namespace py = pybind11;

namespace {

using Doubles = py::array_t<double, py::array::c_style>;
using Integers = py::array_t<std::int64_t, py::array::c_style>;

py::tuple pipeline(const Doubles& cost, const Integers& bytes_made, const Integers& bytes_freed, const Integers& edges,
                   const Integers& group, const Integers& pinned, std::int64_t streams, std::int64_t in_flight,
                   std::optional<std::int64_t> memory_budget, const std::vector<std::string>& names) {
  const py::ssize_t size = cost.size();
  if (cost.ndim() != 1 || edges.ndim() != 2 || edges.shape(1) != 3)
    throw std::invalid_argument("cost must have one dimension and edges the shape (edges, 3)");
  for (const Integers* array : {&bytes_made, &bytes_freed, &group, &pinned})
    if (array->ndim() != 1 || array->size() != size)
      throw std::invalid_argument("bytes_made, bytes_freed, group and pinned must have one entry per cost");
  const auto costs = cost.unchecked<1>();
  const auto made = bytes_made.unchecked<1>(), freed = bytes_freed.unchecked<1>();
  const auto triples = edges.unchecked<2>();
  std::vector<fastlocal::Task> tasks(size);
  for (py::ssize_t i = 0; i < size; ++i) tasks[i] = {costs(i), made(i), freed(i)};
  std::vector<fastlocal::Dependency> dependencies(edges.shape(0));
  for (py::ssize_t e = 0; e < edges.shape(0); ++e) dependencies[e] = {triples(e, 0), triples(e, 1), triples(e, 2)};
  const std::vector<std::int64_t> groups(group.data(), group.data() + size), pins(pinned.data(), pinned.data() + size);

  fastlocal::Pipeline result;
  {
    py::gil_scoped_release release;
    result = fastlocal::pipeline(tasks, dependencies, groups, pins, streams, in_flight, memory_budget, names);
  }
  return py::make_tuple(result.order, result.stage, result.stream, result.start, result.waits, result.period,
                        result.in_flight, result.peak_bytes, result.pools, result.operations);
}

// Tensors cross as addresses: no torch headers here. fastlocal/ops/bn_act.py checks shapes, dtypes and layouts.
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bn_act_forward(Address x, Address residual, Address y, Address weight, Address bias, Address running_mean,
                    Address running_var, Address mean, Address rstd, std::int64_t rows, std::int64_t channels,
                    double momentum, double eps, bool relu, bool bf16, int threads) {
  const fastlocal::BnActForward p{at<void>(x), at<void>(residual), at<void>(y), at<float>(weight), at<float>(bias),
                                  at<float>(running_mean), at<float>(running_var), at<float>(mean), at<float>(rstd),
                                  rows, channels, momentum, eps, relu, bf16, threads};
  py::gil_scoped_release release;
  fastlocal::bn_act_forward(p);
}

void bn_act_backward(Address dy, Address x, Address y, Address dx, Address dresidual, Address weight, Address mean,
                     Address rstd, Address dweight, Address dbias, std::int64_t rows, std::int64_t channels, bool relu,
                     bool bf16, int threads) {
  const fastlocal::BnActBackward p{at<void>(dy), at<void>(x), at<void>(y), at<void>(dx), at<void>(dresidual),
                                   at<float>(weight), at<float>(mean), at<float>(rstd), at<float>(dweight),
                                   at<float>(dbias), rows, channels, relu, bf16, threads};
  py::gil_scoped_release release;
  fastlocal::bn_act_backward(p);
}

// --- captured graphs: handles and streams cross as addresses ---------------------------------------------------------

using Segments = std::vector<std::tuple<std::string, Address, std::int64_t, std::vector<std::int64_t>>>;

std::unique_ptr<fastlocal::RoundExecutor> round_executor(std::shared_ptr<fastlocal::CudaRuntime> runtime,
                                                         const Segments& segments, bool composed) {
  std::vector<fastlocal::Segment> list;
  for (const auto& [name, graph, stream, waits] : segments) list.push_back({name, graph, stream, waits});
  return composed ? fastlocal::compose(std::move(runtime), list) : fastlocal::stream_loop(std::move(runtime), list);
}

void bind_graph_executor(py::module_& module) {
  using fastlocal::CudaRuntime;
  using fastlocal::RoundExecutor;
  py::class_<CudaRuntime, std::shared_ptr<CudaRuntime>>(module, "CudaRuntime")
      .def(py::init(&CudaRuntime::find), py::arg("library"), py::arg("loaded"))
      .def_property_readonly("version", &CudaRuntime::version);
  py::class_<RoundExecutor>(module, "RoundExecutor")
      .def(py::init(&round_executor), py::arg("runtime"), py::arg("segments"), py::arg("composed"))
      .def("upload", &RoundExecutor::upload, py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def("launch", &RoundExecutor::launch, py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def("close", &RoundExecutor::close)
      .def_property_readonly("nodes", &RoundExecutor::nodes)
      .def_property_readonly("edges", &RoundExecutor::edges);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native part of fastlocal; use it through fastlocal.engine._native.";
  module.def("pipeline", &pipeline, py::arg("cost"), py::arg("bytes_made"), py::arg("bytes_freed"), py::arg("edges"),
             py::arg("group"), py::arg("pinned"), py::arg("streams"), py::arg("in_flight"), py::arg("memory_budget"),
             py::arg("names"));
  module.def("bn_act_forward", &bn_act_forward);
  module.def("bn_act_backward", &bn_act_backward);
  module.def("shares_openmp", &fastlocal::shares_openmp);
  bind_graph_executor(module);
}
