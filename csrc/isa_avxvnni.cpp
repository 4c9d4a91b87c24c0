#define PYQKERN_ISA avxvnni
#include "table.inl"
