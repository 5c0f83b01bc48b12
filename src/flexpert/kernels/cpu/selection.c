/* The k largest of a row in the order in which torch's CPU topk gives them, equal values included.
 *
 * Which of equal values comes first follows from the algorithm: torch moves the k-th into place by
 * the C++ library's nth_element, and then sorts what lies before it, if asked to; for few of many it
 * sorts a part. These are median-of-three quickselect, insertion sorts and a heap. That this is still
 * so is tried for each size before it is relied on (step_compiler.py). Included by program.c.
 */

enum { MOST_CHOICES = 1024 };

typedef struct {
    float value;
    int32_t index;
} choice;

/* NaN is larger than all else. */
INLINE int before(choice a, choice b) {
    return ((a.value != a.value) && !(b.value != b.value)) || a.value > b.value;
}

INLINE void swap_choices(choice *a, choice *b) {
    const choice kept = *a;
    *a = *b;
    *b = kept;
}

static void insertion_sort(choice *from, long n) {
    for (long i = 1; i < n; i++) {
        const choice moved = from[i];
        long at = i;
        for (; at > 0 && before(moved, from[at - 1]); at--) from[at] = from[at - 1];
        from[at] = moved;
    }
}

/* Let a hole sink to the bottom of a heap of n, then let `value` rise from there. */
static void sift(choice *heap, long hole, long n, choice value) {
    const long top = hole;
    long child = hole;
    while (child < (n - 1) / 2) {
        child = 2 * (child + 1);
        if (before(heap[child], heap[child - 1])) child--;
        heap[hole] = heap[child];
        hole = child;
    }
    if (n % 2 == 0 && child == (n - 2) / 2) {
        child = 2 * (child + 1);
        heap[hole] = heap[child - 1];
        hole = child - 1;
    }
    for (long parent = (hole - 1) / 2; hole > top && before(heap[parent], value); parent = (hole - 1) / 2) {
        heap[hole] = heap[parent];
        hole = parent;
    }
    heap[hole] = value;
}

/* The first k of n are the foremost; they are a heap. */
static void heap_select(choice *all, long k, long n) {
    for (long parent = (k - 2) / 2; k >= 2 && parent >= 0; parent--) sift(all, parent, k, all[parent]);
    for (long i = k; i < n; i++) {
        if (!before(all[i], all[0])) continue;
        const choice value = all[i];
        all[i] = all[0];
        sift(all, 0, k, value);
    }
}

static void heap_sort(choice *heap, long n) {
    for (; n > 1; n--) {
        const choice value = heap[n - 1];
        heap[n - 1] = heap[0];
        sift(heap, 0, n - 1, value);
    }
}

/* Around the median of the second, the middle and the last, which comes first; where the second part begins. */
static long partition(choice *a, long n) {
    choice *second = a + 1, *middle = a + n / 2, *last = a + n - 1, *median;
    if (before(*second, *middle))
        median = before(*middle, *last) ? middle : before(*second, *last) ? last : second;
    else
        median = before(*second, *last) ? second : before(*middle, *last) ? last : middle;
    swap_choices(a, median);
    for (long low = 1, high = n;; low++) {
        while (before(a[low], a[0])) low++;
        do high--;
        while (before(a[0], a[high]));
        if (low >= high) return low;
        swap_choices(a + low, a + high);
    }
}

/* all[k - 1] is the k-th, and those before it are no later. */
static void select_kth(choice *all, long k, long n) {
    long first = 0, last = n, depth = 0;
    for (long size = n; size > 1; size >>= 1) depth += 2;
    while (last - first > 3) {
        if (depth-- == 0) {
            heap_select(all + first, k - first, last - first);
            swap_choices(all + first, all + k - 1);
            return;
        }
        const long cut = first + partition(all + first, last - first);
        if (cut <= k - 1) first = cut;
        else last = cut;
    }
    insertion_sort(all + first, last - first);
}

/* 1 ≤ k ≤ n. sorted: then k ≤ 17, or k is at most a 64th of n. */
static void select_largest(choice *all, long k, long n, int sorted) {
    if (k * 64 <= n) {
        heap_select(all, k, n);
        heap_sort(all, k);
        return;
    }
    select_kth(all, k, n);
    if (sorted) insertion_sort(all, k - 1);
}

/* [rows, n] → values and indices, [rows, k] each. */
INLINE void topk(const int64_t *op) {
    const int from = op[AT_DTYPES] >> 8 & 255;
    const long rows = op[AT_SIZES], n = op[AT_SIZES + 1], k = op[AT_SIZES + 2];
    float values[MOST_CHOICES + 16];
    choice all[MOST_CHOICES];
    for (long r = 0; r < rows; r++) {
        gather((const char *)op[AT_A] + r * op[AT_A + 1] * ITEM[from], op[AT_A + 2], from, n, values);
        for (long i = 0; i < n; i++) all[i] = (choice){values[i], (int32_t)i};
        select_largest(all, k, n, (int)op[AT_EXTRA]);
        int64_t *indices = (int64_t *)op[AT_B] + r * k;
        for (long i = 0; i < k; i++) {
            values[i] = all[i].value;
            indices[i] = all[i].index;
        }
        scatter(values, (char *)op[AT_OUT] + r * k * ITEM[from], 1, from, k);
    }
}
