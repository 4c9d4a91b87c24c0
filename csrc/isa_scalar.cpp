#define PYQKERN_ISA scalar
#include "table.inl"
