// One token for each row of logits; the definition is psann_fast/generate/sampling.py's next_tokens.
//
// In the falling order of the logits, equal ones by id, each token owns an interval as long as its weight, and a few points of that
// order are asked for: where top-k and top-p cut it, and where the draw falls. To sort all tokens would take most of the time. So
// they are dealt to buckets that follow that order, whose weights are added up, and only a bucket that holds such a point
// is sorted.
#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "simd.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int BUCKETS = 1024;
constexpr double WIDEST = 40;         // what is less likely than e^-40 times the likeliest token shares the last bucket
constexpr double SMALLEST = -708;     // e to this is the last normal number; what lies below weighs nothing
constexpr int64_t GRAIN = 1 << 13;    // logits below which one thread is faster

// As many doubles as a register holds: gcc compares and selects wider vectors one number at a time.
constexpr int LANES = WIDTH / 2;
typedef double Wide __attribute__((vector_size(LANES * 8)));
typedef int64_t Whole __attribute__((vector_size(LANES * 8)));
typedef int32_t Index __attribute__((vector_size(LANES * 4)));
typedef double WideAnywhere __attribute__((vector_size(LANES * 8), aligned(1), may_alias));
typedef float NarrowAnywhere __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
typedef int32_t IntAnywhere __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));
typedef int32_t IndexAnywhere __attribute__((vector_size(LANES * 4), aligned(1), may_alias));

INLINE Wide wide(const double* p) { return *reinterpret_cast<const WideAnywhere*>(p); }
INLINE Wide wide(const float* p) { return __builtin_convertvector(*reinterpret_cast<const NarrowAnywhere*>(p), Wide); }
INLINE void keep(double* p, Wide x) { *reinterpret_cast<WideAnywhere*>(p) = x; }
INLINE Wide each(double x) { return x - Wide{}; }
INLINE Wide multiply_add(Wide a, Wide b, Wide c) {
#if defined(PSANN_AVX512)
    return (Wide)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(PSANN_AVX2)
    return (Wide)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
}

// e^x for x of at most 0, to 1e-15 relative; 1 at 0; NaN stays.
INLINE Wide exponential(Wide x) {
    // 1 / k!, k from 12 down: the next term is below 2e-16 for |r| <= ln(2) / 2.
    static const double TERMS[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                                   1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
    constexpr double MAGIC = 0x1.8p52;  // added, it leaves a whole number in the lowest bits
    Wide bounded = x < SMALLEST ? each(SMALLEST) : x;
    Wide shifted = bounded * 1.4426950408889634 + MAGIC, n = shifted - MAGIC;
    // ln(2) in two parts, the first short enough that its product with n is exact.
    Wide r = (bounded - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    Wide y = each(TERMS[0]);
    UNROLL for (int i = 1; i < 13; i++) y = multiply_add(y, r, each(TERMS[i]));
    Whole power = ((Whole)shifted << 52) + (1023LL << 52);
    y *= (Wide)power;
    return x < SMALLEST ? Wide{} : y;
}

struct Bucket {
    double weight;
    int64_t tokens;
};

// A token, its place in the order, and where its interval ends.
struct Point {
    int64_t token, rank;
    double end;
};

template <class T> struct Row {
    const T* logits;
    const double* weights;    // relative to the likeliest token's
    const int32_t* bucket_of;
    int32_t* sorted;          // tokens of the bucket that was asked for last
    int64_t vocabulary;
    Bucket until[BUCKETS + 1];  // of all buckets before

    // Fills `sorted`; how many there are is known.
    void sort(int bucket) {
        int64_t count = 0;
        int64_t i = 0;
        for (; i + WIDTH <= vocabulary; i += WIDTH) {
            if (every(*reinterpret_cast<const IntAnywhere*>(bucket_of + i) != bucket)) continue;
            for (int lane = 0; lane < WIDTH; lane++)
                if (bucket_of[i + lane] == bucket) sorted[count++] = static_cast<int32_t>(i + lane);
        }
        for (; i < vocabulary; i++)
            if (bucket_of[i] == bucket) sorted[count++] = static_cast<int32_t>(i);
        auto comes_first = [&](int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
        int64_t gap = 1;
        while (gap < count / 3) gap = 3 * gap + 1;
        for (; gap > 0; gap /= 3) {
            for (int64_t i = gap; i < count; i++) {
                int32_t token = sorted[i];
                int64_t j = i;
                for (; j >= gap && comes_first(token, sorted[j - gap]); j -= gap) sorted[j] = sorted[j - gap];
                sorted[j] = token;
            }
        }
    }

    // The first token of a bucket for which `holds` is true of its point; its last token if none is.
    template <class Holds> Point find(int bucket, const Holds& holds) {
        sort(bucket);
        int64_t count = until[bucket + 1].tokens - until[bucket].tokens;
        Point p = {0, 0, until[bucket].weight};
        for (int64_t i = 0; i < count; i++) {
            p = {sorted[i], until[bucket].tokens + i, p.end + weights[sorted[i]]};
            if (holds(p)) break;
        }
        return p;
    }

    Point at_rank(int64_t rank) {
        int bucket = 0;
        while (until[bucket + 1].tokens <= rank) bucket++;
        return find(bucket, [&](const Point& p) { return p.rank == rank; });
    }

    // The first token whose interval ends above `value`, or at it too.
    Point at_value(double value, bool is_at) {
        int bucket = 0;
        while (bucket < BUCKETS && !(until[bucket + 1].weight > value || (is_at && until[bucket + 1].weight == value))) bucket++;
        if (bucket == BUCKETS) return at_rank(vocabulary - 1);
        return find(bucket, [&](const Point& p) { return p.end > value || (is_at && p.end == value); });
    }
};

template <class T> static int64_t likeliest(const T* logits, int64_t vocabulary) {
    int64_t best = 0;
    for (int64_t i = 0; i < vocabulary; i++) {
        if (logits[i] != logits[i]) return -1;
        if (logits[i] > logits[best]) best = i;
    }
    return best;
}

template <class T> static int64_t sample(const SampleTokens& a, int64_t row) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    int64_t vocabulary = a.vocabulary, padded = (vocabulary + LANES - 1) / LANES * LANES;
    if (a.temperature[row] == 0) return likeliest(logits, vocabulary);
    Workspace memory(4 * padded);
    double* weights = reinterpret_cast<double*>(memory.data);
    int32_t* bucket_of = reinterpret_cast<int32_t*>(memory.data + 2 * padded);
    double highest = -__builtin_inf(), lowest = __builtin_inf();
    {
        Wide high = each(highest), low = each(lowest);
        int64_t whole = vocabulary / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES) {
            Wide x = wide(logits + i);
            keep(weights + i, x);
            high = x > high ? x : high;
            low = x < low ? x : low;
        }
        for (int i = 0; i < LANES; i++) {
            highest = high[i] > highest ? high[i] : highest;
            lowest = low[i] < lowest ? low[i] : lowest;
        }
        for (int64_t i = whole; i < padded; i++) {
            weights[i] = i < vocabulary ? static_cast<double>(logits[i]) : -__builtin_inf();
            if (weights[i] > highest) highest = weights[i];
            if (i < vocabulary && weights[i] < lowest) lowest = weights[i];
        }
    }
    double temperature = a.temperature[row] < 1e-6 ? 1e-6 : a.temperature[row], spread = highest - lowest;
    if (!(spread < WIDEST * temperature)) spread = WIDEST * temperature;
    double per_bucket = spread > 0 ? BUCKETS / spread : 0, minimum = a.min_p[row];
    Wide total = {};
    Whole likely = {}, positive = {};
    for (int64_t i = 0; i < padded; i += LANES) {
        Wide below = wide(weights + i) - highest, weight = exponential(below / temperature), bucket = below * -per_bucket;
        // NaN goes to 0, where it harms nobody.
        bucket = bucket < BUCKETS - 1 ? bucket : each(BUCKETS - 1);
        bucket = bucket > 0 ? bucket : Wide{};
        keep(weights + i, weight);
        *reinterpret_cast<IndexAnywhere*>(bucket_of + i) = __builtin_convertvector(bucket, Index);
        total += weight;
        likely -= (Whole)(weight >= minimum);
        positive -= (Whole)(weight > 0);
    }
    double sum = 0;
    int64_t least = 0, reachable = 0;
    for (int i = 0; i < LANES; i++) sum += total[i], least += likely[i], reachable += positive[i];
    if (!(sum < __builtin_inf())) return -1;  // NaN too: a logit is, or the highest one is infinite

    Row<T> r = {logits, weights, bucket_of, bucket_of + padded, vocabulary, {}};
    for (int64_t i = 0; i < vocabulary; i++) {
        Bucket& own = r.until[bucket_of[i] + 1];
        own.weight += weights[i];
        own.tokens++;
    }
    for (int b = 0; b < BUCKETS; b++) r.until[b + 1].weight += r.until[b].weight, r.until[b + 1].tokens += r.until[b].tokens;

    int64_t kept = a.top_k[row] < vocabulary ? a.top_k[row] : vocabulary;
    double end = kept < vocabulary ? r.at_rank(kept - 1).end : r.until[BUCKETS].weight;
    if (a.top_p[row] < 1) {
        // What comes before a token decides whether it is kept, so the token that crosses p is.
        Point crossing = r.at_value(a.top_p[row] * end, true);
        if (crossing.rank + 1 < kept) kept = crossing.rank + 1, end = crossing.end;
    }
    if (minimum > 0 && least < kept) kept = least, end = r.at_rank(kept - 1).end;
    if (reachable < kept) kept = reachable;
    Point drawn = r.at_value(a.draws[row] * end, false);
    // Rounding may put the draw on the last end.
    return drawn.rank < kept ? drawn.token : r.at_rank(kept - 1).token;
}

}  // namespace

void sample_tokens(const SampleTokens& a) {
    parallel(a.rows * a.vocabulary < GRAIN ? 1 : a.threads, a.rows,
             [&](int64_t row) { a.tokens[row] = a.is_double ? sample<double>(a, row) : sample<float>(a, row); });
}

}  // namespace PSANN_NAMESPACE
