#define PYQKERN_ISA avx512vnni
#include "table.inl"
