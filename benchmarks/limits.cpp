// What this machine can do: loops that do nothing but the instruction, or the memory traffic, that is measured.
// limits.py compiles this file with -march=native, so the compiler's own cpuid check decides what is in: an
// instruction that the CPU lacks is left out and reports 0 operations. Peaks run on zeros, with twelve (or eight)
// independent accumulators, more than latency times throughput needs: nothing real can be faster.
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SIX(INS, R) INS R "0\n\t" INS R "1\n\t" INS R "2\n\t" INS R "3\n\t" INS R "4\n\t" INS R "5\n\t"
#define TWELVE(INS, R) SIX(INS, R) INS R "6\n\t" INS R "7\n\t" INS R "8\n\t" INS R "9\n\t" INS R "10\n\t" INS R "11\n\t"
#define CLOBBERS \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
        "xmm13", "xmm14", "xmm15", "cc"
#define LOOP(BODY) \
    asm volatile("vzeroall\n\t.p2align 6\n1:\n\t" BODY "dec %0\n\tjnz 1b\n\tvzeroupper" : "+r"(loops) : : CLOBBERS)
// What AVX2 without VNNI can do for products of 8 bits, in the registers alone. T and U hold what is added up, ACC the
// sums; T and U are renamed each time. The number of products is that of 8-bit pairs.
//   MADD      16 products on int16, and their int32 addition: exact for every pair of 8-bit numbers
//   WINOGRAD  32 products as 16 of sums, (a0 + b1) * (a1 + b0): exact too (S. Winograd, "A new algorithm for inner
//             product", 1968)
//   MADDUBS   32 products of u8 and s8, added in pairs in an int16: exact where no pair passes 32767
#define MADD(T, ACC) \
    "vpmaddwd %%ymm14, %%ymm15, %%ymm" T "\n\tvpaddd %%ymm" T ", %%ymm" ACC ", %%ymm" ACC "\n\t"

#define WINOGRAD(T, U, ACC) \
    "vpaddw %%ymm12, %%ymm14, %%ymm" T "\n\tvpaddw %%ymm13, %%ymm15, %%ymm" U "\n\tvpmaddwd %%ymm" T ", %%ymm" U \
    ", %%ymm" T "\n\tvpaddd %%ymm" T ", %%ymm" ACC ", %%ymm" ACC "\n\t"
#define MADDUBS(T) "vpmaddubsw %%ymm14, %%ymm15, %%ymm" T "\n\t"
// Another 32 products, added to those of T in int16 (which they must not pass).
#define FOLD(T, U) MADDUBS(U) "vpaddw %%ymm" U ", %%ymm" T ", %%ymm" T "\n\t"
// The int16 of T into the int32 of ACC.
#define WIDEN(T, ACC) \
    "vpmaddwd %%ymm13, %%ymm" T ", %%ymm" T "\n\tvpaddd %%ymm" T ", %%ymm" ACC ", %%ymm" ACC "\n\t"
#define IN_TWOS(T, U, ACC) MADDUBS(T) FOLD(T, U) WIDEN(T, ACC)
#define IN_EIGHTS(T, U, ACC) \
    MADDUBS(T) FOLD(T, U) FOLD(T, U) FOLD(T, U) FOLD(T, U) FOLD(T, U) FOLD(T, U) FOLD(T, U) WIDEN(T, ACC)
#define SIX_SUMS(MIX) MIX("8", "9", "0") MIX("10", "11", "1") MIX("8", "9", "2") MIX("10", "11", "3") \
    MIX("8", "9", "4") MIX("10", "11", "5")
#define SATURATING(T, U, ACC) MADDUBS(T) WIDEN(T, ACC)

// Runs `loops` rounds of the named instruction and returns the operations (2 for a multiply-add) of one round.
extern "C" int peak(const char* name, long loops) {
    (void)name, (void)loops;
#ifdef __AVX512VNNI__
    if (!std::strcmp(name, "vpdpbusd zmm")) {
        LOOP(TWELVE("vpdpbusd %%zmm14, %%zmm15, ", "%%zmm"));
        return 12 * 64 * 2;
    }
#endif
#ifdef __AVXVNNI__
    if (!std::strcmp(name, "vpdpbusd ymm")) {
        LOOP(TWELVE("%{vex%} vpdpbusd %%ymm14, %%ymm15, ", "%%ymm"));
        return 12 * 32 * 2;
    }
#endif
#ifdef __AVX2__
    if (!std::strcmp(name, "vpmaddwd ymm")) {
        LOOP(MADD("8", "0") MADD("9", "1") MADD("10", "2") MADD("11", "3") MADD("8", "4") MADD("9", "5")
                 MADD("10", "6") MADD("11", "7"));
        return 8 * 16 * 2;
    }
    if (!std::strcmp(name, "winograd ymm")) {
        LOOP(SIX_SUMS(WINOGRAD));
        return 6 * 32 * 2;
    }
    if (!std::strcmp(name, "vpmaddubsw ymm")) {
        LOOP(SIX_SUMS(SATURATING));
        return 6 * 32 * 2;
    }
    if (!std::strcmp(name, "vpmaddubsw ymm in twos")) {
        LOOP(SIX_SUMS(IN_TWOS));
        return 6 * 64 * 2;
    }
    if (!std::strcmp(name, "vpmaddubsw ymm in eights")) {
        LOOP(SIX_SUMS(IN_EIGHTS));
        return 6 * 256 * 2;
    }
#endif
#ifdef __FMA__
    if (!std::strcmp(name, "fp32 fma ymm")) {
        LOOP(TWELVE("vfmadd231ps %%ymm14, %%ymm15, ", "%%ymm"));
        return 12 * 8 * 2;
    }
#endif
#ifdef __AVX512F__
    if (!std::strcmp(name, "fp32 fma zmm")) {
        LOOP(TWELVE("vfmadd231ps %%zmm14, %%zmm15, ", "%%zmm"));
        return 12 * 16 * 2;
    }
#endif
#ifdef __AVX512BF16__
    if (!std::strcmp(name, "bf16 dot zmm")) {
        LOOP(TWELVE("vdpbf16ps %%zmm14, %%zmm15, ", "%%zmm"));
        return 12 * 32 * 2;
    }
#endif
    return 0;
}

// Memory. Lines of 64 bytes, in vectors of the CPU's own size: g++ splits a larger one into scalars.
#if defined(__AVX512F__)
constexpr size_t PARTS = 1;
#elif defined(__AVX__)
constexpr size_t PARTS = 2;
#else
constexpr size_t PARTS = 4;
#endif
typedef uint64_t part_t __attribute__((vector_size(64 / PARTS), may_alias));

static inline void store(part_t* to, part_t value) { *to = value; }
static inline void stream(part_t* to, part_t value) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i&>(value));
#elif defined(__AVX__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i&>(value));
#else
    *to = value;
#endif
}
static inline void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
constexpr size_t AHEAD = 32 * PARTS;  // 2 KiB

// Reads `lines` lines, `repeats` times over, in PLACES places at once, and asks for those to come or leaves that to the
// CPU's own prefetchers: one CPU is faster so, another so. What is read is folded into the result so that it is read.
template <bool ASK, size_t PLACES> static uint64_t read_all(const part_t* from, size_t lines, long repeats) {
    const size_t place = lines / PLACES * PARTS;
    part_t a{}, b{};
    for (long r = 0; r < repeats; r++) {
        for (size_t i = 0; i < place; i += PARTS) {
#pragma GCC unroll 4
            for (size_t p = 0; p < PLACES; p++) {
                const part_t* line = from + p * place + i;
                if (ASK) __builtin_prefetch(line + AHEAD);
#pragma GCC unroll 4
                for (size_t part = 0; part < PARTS; part += 2) {
                    a ^= line[part];
                    if (part + 1 < PARTS) b ^= line[part + 1];
                }
            }
        }
        for (size_t i = PLACES * place; i < lines * PARTS; i++) a ^= from[i];
        asm volatile("" : : : "memory");
    }
    a ^= b;
    uint64_t folded = 0;
    for (size_t i = 0; i < sizeof(part_t) / 8; i++) folded ^= a[i];
    return folded;
}
extern "C" uint64_t read_memory(const part_t* from, size_t lines, long repeats, int ask, int places) {
    if (places == 4) return (ask ? read_all<true, 4> : read_all<false, 4>)(from, lines, repeats);
    return (ask ? read_all<true, 1> : read_all<false, 1>)(from, lines, repeats);
}

// `units` times: reads R lines, writes W lines. R:W = 4:1 is what quantizing fp32 to int8 moves, 1:4 its inverse.
template <int R, int W, void (*PUT)(part_t*, part_t)>
static void move(part_t* to, const part_t* from, size_t units, long repeats) {
    for (long r = 0; r < repeats; r++) {
        for (size_t u = 0; u < units; u++) {
            const part_t* source = from + R * PARTS * u;
            part_t* target = to + W * PARTS * u;
#pragma GCC unroll 4
            for (int i = 0; i < R; i++) __builtin_prefetch(source + i * PARTS + AHEAD);
#pragma GCC unroll 4
            for (size_t part = 0; part < PARTS; part++) {
                part_t value{};
#pragma GCC unroll 4
                for (int i = 0; i < R; i++) value ^= source[i * PARTS + part];
#pragma GCC unroll 4
                for (int i = 0; i < W; i++) PUT(target + i * PARTS + part, value);
            }
        }
        fence();
    }
}

// Returns 1 when the mix of reads and writes is one of those compiled in.
extern "C" int move_memory(part_t* to, const part_t* from, size_t units, long repeats, int reads, int writes,
                           int non_temporal) {
#define MIX(R, W) \
    if (reads == R && writes == W) \
        return (non_temporal ? move<R, W, stream> : move<R, W, store>)(to, from, units, repeats), 1;
    MIX(4, 1) MIX(1, 4) MIX(2, 1) MIX(1, 2) MIX(1, 1)
    return 0;
}
