#define PYQKERN_ISA avx512vnni
#include "kernels/table.inl"
