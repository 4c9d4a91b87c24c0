#define PYQKERN_ISA avxvnni
#include "kernels/table.inl"
