#define PYQKERN_ISA avx2
#include "table.inl"
