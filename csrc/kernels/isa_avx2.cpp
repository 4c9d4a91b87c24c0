#define PYQKERN_ISA avx2
#include "kernels/table.inl"
