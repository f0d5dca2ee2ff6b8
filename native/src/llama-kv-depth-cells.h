#pragma once

#include "llama.h"

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <limits>
#include <vector>

// which position sits in which row of one layer, for one sequence
//
// unlike llama_kv_cells a cell belongs to one sequence only, so a position is all there is to know about it. with one
// instance per layer the bookkeeping has to stay small: 12 bytes per cell against the ~140 of llama_kv_cells
class llama_kv_depth_cells {
public:
    void resize(uint32_t n) {
        pos.assign(n, -1);
        acc.assign(n, 0.0f);
        cnt.assign(n, 0.0f);
        shift.clear();

        n_used = 0;
        n_rows = 0;
        head   = 0;
        p_max  = -1;

        pos_scored = -1;
        n_evicted  = 0;
    }

    void clear() {
        resize(pos.size());
    }

    uint32_t size() const {
        return pos.size();
    }

    uint32_t get_used() const {
        return n_used;
    }

    // the index of the last cell that is used + 1
    uint32_t used_max_p1() const {
        return n_rows;
    }

    bool is_empty(uint32_t i) const {
        return pos[i] < 0;
    }

    llama_pos pos_get(uint32_t i) const {
        return pos[i];
    }

    // [size()], -1 for an empty cell
    const llama_pos * pos_data() const {
        return pos.data();
    }

    llama_pos pos_min() const {
        llama_pos res = -1;
        for (uint32_t i = 0; i < n_rows && res != 0; ++i) {
            if (pos[i] >= 0 && (res < 0 || pos[i] < res)) {
                res = pos[i];
            }
        }
        return res;
    }

    llama_pos pos_max() const {
        return p_max;
    }

    // place a position in the lowest empty cell, returns its row
    // low rows first: the rows that attention reads are [0, used_max_p1())
    uint32_t add(llama_pos p) {
        assert(p >= 0);
        assert(n_used < pos.size());

        while (pos[head] >= 0) {
            head++;
        }

        set(head, p);

        return head++;
    }

    // place a position in a given empty cell
    void set(uint32_t i, llama_pos p) {
        assert(pos[i] < 0 && p >= 0);

        pos[i] = p;
        acc[i] = 0.0f;
        cnt[i] = 0.0f;
        if (!shift.empty()) {
            shift[i] = 0;
        }

        n_used++;
        n_rows = std::max(n_rows, i + 1);
        p_max  = std::max(p_max, p);
    }

    void rm(uint32_t i) {
        const llama_pos p = pos[i];
        assert(p >= 0);

        pos[i] = -1;
        if (!shift.empty()) {
            shift[i] = 0;
        }

        n_used--;
        head = std::min(head, i);

        while (n_rows > 0 && pos[n_rows - 1] < 0) {
            n_rows--;
        }

        if (p == p_max) {
            update_max();
        }

        if (n_used == 0) {
            pos_scored = -1;
            n_evicted  = 0;
        }
    }

    // remove the positions in [p0, p1)
    void rm_range(llama_pos p0, llama_pos p1) {
        // front ends remove what is not there before every step, in every layer
        if (p0 > p_max) {
            return;
        }

        // no need to look for the last position after each of them
        p_max = std::numeric_limits<llama_pos>::max();

        for (uint32_t i = n_rows; i-- > 0; ) {
            if (pos[i] >= p0 && pos[i] < p1) {
                rm(i);
            }
        }

        update_max();

        pos_scored = std::min(pos_scored, p_max);
    }

    // pos = pos + d for the positions in [p0, p1), cells that become negative are removed
    void add_range(llama_pos p0, llama_pos p1, llama_pos d) {
        for (uint32_t i = n_rows; i-- > 0; ) {
            if (pos[i] >= p0 && pos[i] < p1) {
                move(i, pos[i] + d);
            }
        }

        update_max();

        pos_scored = std::min(pos_scored, p_max);
    }

    // pos = pos / d for the positions in [p0, p1)
    void div_range(llama_pos p0, llama_pos p1, int d) {
        for (uint32_t i = n_rows; i-- > 0; ) {
            if (pos[i] >= p0 && pos[i] < p1) {
                move(i, pos[i] / d);
            }
        }

        update_max();

        pos_scored = std::min(pos_scored, p_max);
    }

    // rotary shift that the stored keys still lack, empty: none of them
    bool get_has_shift() const {
        return !shift.empty();
    }

    llama_pos get_shift(uint32_t i) const {
        return shift.empty() ? 0 : shift[i];
    }

    void set_shift(uint32_t i, llama_pos d) {
        if (shift.empty()) {
            shift.assign(pos.size(), 0);
        }
        shift[i] = d;
    }

    void reset_shift() {
        shift.clear();
    }

    // state of the token-scoring rule, see llama-kv-score.h
    // acc, cnt: [size()], what a scorer accumulates for each cell, zero for a new token
    std::vector<float> acc;
    std::vector<float> cnt;

    // the last position whose query has been counted, -1: none
    llama_pos pos_scored = -1;

    // cells freed by eviction since the sequence was last empty
    uint64_t n_evicted = 0;

private:
    std::vector<llama_pos> pos;
    std::vector<llama_pos> shift;

    uint32_t n_used = 0;
    uint32_t n_rows = 0;

    // no cell before this one is empty
    uint32_t head = 0;

    llama_pos p_max = -1;

    void update_max() {
        p_max = -1;
        for (uint32_t i = 0; i < n_rows; ++i) {
            p_max = std::max(p_max, pos[i]);
        }
    }

    void move(uint32_t i, llama_pos p) {
        if (p < 0) {
            rm(i);
            return;
        }

        set_shift(i, get_shift(i) + p - pos[i]);
        pos[i] = p;
    }
};

// positions of one sequence that eviction must not touch
class llama_kv_depth_pins {
public:
    void clear() {
        spans.clear();
    }

    bool empty() const {
        return spans.empty();
    }

    bool has(llama_pos p) const {
        for (const auto & s : spans) {
            if (p >= s.first && p < s.second) {
                return true;
            }
        }
        return false;
    }

    // number of pinned positions that are not sinks
    uint32_t count(uint32_t n_sink) const {
        uint32_t res = 0;
        for (const auto & s : spans) {
            const llama_pos p0 = std::max(s.first, (llama_pos) n_sink);
            res += s.second > p0 ? s.second - p0 : 0;
        }
        return res;
    }

    void add(llama_pos p0, llama_pos p1) {
        if (p1 <= p0) {
            return;
        }
        // merge with what is pinned already, so that no position counts twice
        rm(p0, p1);
        spans.emplace_back(p0, p1);
    }

    void rm(llama_pos p0, llama_pos p1) {
        if (p1 <= p0) {
            return;
        }
        std::vector<std::pair<llama_pos, llama_pos>> res;
        for (const auto & s : spans) {
            if (s.first < std::min(s.second, p0)) {
                res.emplace_back(s.first, std::min(s.second, p0));
            }
            if (std::max(s.first, p1) < s.second) {
                res.emplace_back(std::max(s.first, p1), s.second);
            }
        }
        spans = std::move(res);
    }

    // move the pinned positions in [p0, p1) by d
    void shift(llama_pos p0, llama_pos p1, llama_pos d) {
        std::vector<std::pair<llama_pos, llama_pos>> moved;
        for (const auto & s : spans) {
            const llama_pos m0 = std::max(s.first,  p0);
            const llama_pos m1 = std::min(s.second, p1);
            // a span may be pinned up to the largest position there is
            const int64_t n0 = std::max<int64_t>((int64_t) m0 + d, 0);
            const int64_t n1 = std::min<int64_t>((int64_t) m1 + d, std::numeric_limits<llama_pos>::max());

            if (m0 < m1 && n0 < n1) {
                moved.emplace_back(n0, n1);
            }
        }
        rm(p0, p1);
        for (const auto & s : moved) {
            add(s.first, s.second);
        }
    }

    // [p0, p1)
    std::vector<std::pair<llama_pos, llama_pos>> spans;
};
