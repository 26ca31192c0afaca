/* Exceptions of guest svme, for C and assembly. */
#ifndef SVME_H
#define SVME_H

#define EXCEPTIONS			32
#define EXCEPTION_STUB_SIZE		16
/* #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP, #VC, #SX (APM vol. 2, 8.2 Vectors) */
#define EXCEPTIONS_WITH_ERROR_CODE	0x60227d00

#endif
