#define PYQKERN_ISA scalar
#include "kernels/table.inl"
