// The binding of optimizer.cpp.
#include <pybind11/stl.h>

#include <memory>

#include "python/tensors.h"

namespace pyqkern {
namespace {

typedef std::vector<py::object> Objects;
typedef std::vector<std::unique_ptr<Tensor>> Tensors;

// All of a list's tensors, which must be as many as `count`.
Tensors read_all(const char* name, const Objects& objects, size_t count) {
  if (objects.size() != count)
    throw py::value_error(std::string(name) + " must be " + std::to_string(count) + " tensors, got " +
                          std::to_string(objects.size()));
  Tensors tensors;
  for (const py::object& object : objects) tensors.push_back(std::make_unique<Tensor>(name, object));
  return tensors;
}

void optimizer_step_call(int optimizer, const std::vector<float>& numbers, py::handle maps, const Objects& params,
                         const Objects& grads, const Objects& state1, const Objects& state2, const Objects& absmax1,
                         const Objects& absmax2) {
  if (optimizer < kAdam || optimizer > kLion)
    throw py::value_error("optimizer must be from 0 to 2, got " + std::to_string(optimizer));
  if (numbers.size() != kStepNumbers)
    throw py::value_error("numbers must be 10, got " + std::to_string(numbers.size()));
  const Tensor of_maps("maps", maps);
  const float* floats = of_maps.as<float>(2 * sizeof(DynamicMap) / sizeof(float));
  DynamicMap both[2];
  memcpy(both, floats, sizeof both);
  Step step{optimizer,  numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
            numbers[5], numbers[6], numbers[7], numbers[8], numbers[9], both};

  const size_t count = params.size(), second = optimizer == kAdam ? count : 0;
  const bool has_codes = !absmax1.empty();
  const Tensors p = read_all("params", params, count), g = read_all("grads", grads, count),
                s1 = read_all("state1", state1, count), s2 = read_all("state2", state2, second),
                a1 = read_all("absmax1", absmax1, has_codes ? count : 0),
                a2 = read_all("absmax2", absmax2, has_codes ? second : 0);
  std::vector<Trained> trained;
  for (size_t i = 0; i < count; ++i) {
    const size_t n = p[i]->elements(), blocks = (n + kStateBlock - 1) / kStateBlock;
    auto state = [&](const Tensor& t) -> void* {
      return has_codes ? static_cast<void*>(t.as<uint8_t>(n)) : t.as<float>(n);
    };
    Trained t{};
    t.p = p[i]->data, t.p_dtype = p[i]->dtype();
    t.g = g[i]->data, t.g_dtype = g[i]->dtype();
    g[i]->check_elements(t.n = n);
    t.state1 = state(*s1[i]);
    if (second) t.state2 = state(*s2[i]);
    if (has_codes) t.absmax1 = a1[i]->as<float>(blocks);
    if (has_codes && second) t.absmax2 = a2[i]->as<float>(blocks);
    t.has_codes = has_codes;
    trained.push_back(t);
  }
  without_gil_to_the_end([&] { optimizer_step(step, trained.data(), count); });
}

double square_sum_call(const Objects& tensors, float scale) {
  const Tensors read = read_all("tensors", tensors, tensors.size());
  std::vector<Squared> squared;
  for (const auto& t : read) squared.push_back({t->data, t->dtype(), t->elements()});
  double sum = 0;
  without_gil([&] { sum = square_sum(squared.data(), squared.size(), scale); });
  return sum;
}

}  // namespace

void add_optimizers(py::module_& m) {
  m.def("optimizer_step", &optimizer_step_call,
        "0: Adam, 1: momentum, 2: Lion; the numbers of Step; maps fp32 [2, 31]; params, grads, state1, state2, absmax1 "
        "and absmax2: tensors for each parameter, or no state2 (1, 2), no absmax (fp32 states). Not ended by Ctrl-C.");
  m.def("square_sum", &square_sum_call, "The sum of (scale * x)^2 of all tensors; NaN where a gradient is too large.");
}

}  // namespace pyqkern
