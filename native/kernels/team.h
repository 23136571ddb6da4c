// Threads: the OpenMP team that the process already has (torch's), so that two pools never fight for the same cores.
#pragma once

namespace spicerack {

// One thread of a team: 0 is the one that called.
struct Member {
    int index, count;
};

// How many threads that team may use now; torch.set_num_threads changes it. 1 if there is none.
int team_size();

// Calls work(context, member) once on each of at most `threads` threads and returns when all are done. What the first of
// them throws is thrown again here, then; nothing may throw before it waits for all.
void run_team(int threads, void (*work)(void*, Member), void* context);

// Within work: returns when every member has come here.
void wait_for_all(Member me);

}  // namespace spicerack
