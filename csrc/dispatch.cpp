// Which kernels were built, which of them this CPU runs, and which are in use.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyqkern {

namespace scalar { extern const Kernels table; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels table; }
namespace avxvnni { extern const Kernels table; }
namespace avx512vnni { extern const Kernels table; }
const Kernels* const kBuilt[] = {&avx512vnni::table, &avxvnni::table, &avx2::table, &scalar::table};
#else
const Kernels* const kBuilt[] = {&scalar::table};
#endif
const size_t kBuiltCount = sizeof kBuilt / sizeof *kBuilt;

namespace {

#if defined(__x86_64__)
// The CpuFeatures of this machine, read from the CPU itself: compilers differ in which names __builtin_cpu_supports
// knows.
unsigned cpu_features() {
  unsigned a, b, c, d, features = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !avx) return features;
  unsigned low, high;  // XCR0: which registers the operating system saves
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  const bool avx2 = b >> 5 & 1, f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1,
             vnni = c >> 11 & 1;
  if (ymm && avx2 && fma && f16c) features |= kAvx2;
  if (zmm && f && dq && bw && vl) features |= kAvx512;
  if (zmm && vnni) features |= kAvx512Vnni;
  const unsigned leaves = a;
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && ymm && (a >> 4 & 1)) features |= kAvxVnni;
  return features;
}
#else
unsigned cpu_features() { return 0; }
#endif

std::atomic<const Kernels*> in_use{nullptr};

const Kernels& find(const char* name, const char* source) {
  std::string usable;
  for (size_t i = 0; i < kBuiltCount; ++i) {
    if (!supported(*kBuilt[i])) continue;
    if (!strcmp(kBuilt[i]->name, name)) return *kBuilt[i];
    usable += (usable.empty() ? "" : ", ") + std::string(kBuilt[i]->name);
  }
  throw std::invalid_argument(std::string(source) + " must name an ISA that this CPU runs, got '" + name +
                              "'; use one of: " + usable);
}

const Kernels& best() {
  for (size_t i = 0; i < kBuiltCount; ++i)
    if (supported(*kBuilt[i])) return *kBuilt[i];
  return scalar::table;
}

}  // namespace

bool supported(const Kernels& k) {
  static const unsigned features = cpu_features();
  return (k.needs & ~features) == 0;
}

const Kernels& kernels() {
  const Kernels* k = in_use.load(std::memory_order_acquire);
  if (!k) {
    const char* name = std::getenv("PYQKERN_ISA");
    k = name && *name ? &find(name, "PYQKERN_ISA") : &best();
    in_use.store(k, std::memory_order_release);
  }
  return *k;
}

const char* set_isa(const char* name) {
  const Kernels &wanted = find(name, "isa"), &previous = kernels();
  in_use.store(&wanted, std::memory_order_release);
  return previous.name;
}

}  // namespace pyqkern
