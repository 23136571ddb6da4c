// Threads: the OpenMP team that the process already has (torch's), so that two pools never fight for the same cores.
#pragma once

namespace spicerack {

// How many threads that team may use now; torch.set_num_threads changes it. 1 if there is none.
int team_size();

// Calls work(context) once on each of at most `threads` threads and returns when all are done.
void run_team(int threads, void (*work)(void*), void* context);

}  // namespace spicerack
