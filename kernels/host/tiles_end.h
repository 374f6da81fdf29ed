/* Ends what tiles.h began. */

#if defined(HAS_AMX)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
