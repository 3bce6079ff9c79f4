"The numbers from 1 to `count`, which tasks take one after the other: one that begins late, or is interrupted, takes fewer."
mutable struct Shares
    const count::Int
    @atomic next::Int
    @atomic done::Int
end

function Base.iterate(shares::Shares, last = 0)
    last > 0 && @atomic shares.done += 1
    i = @atomic shares.next += 1
    return i <= shares.count ? (i, i) : nothing
end

"Call `work` with `Shares` of `count`, over which it iterates, on as many threads as there are; return when all are done."
function share(work, count)
    shares = Shares(count, 0, 0)
    tasks = [Threads.@spawn((@atomic shares.next) < count && work(shares)) for _ in 2:min(Threads.nthreads(), count)]
    try
        work(shares)
    finally
        await(shares, tasks)
    end
    return nothing
end

"Wait until all is done, at first without giving up the processor: usually that is sooner than another task could be run."
function await(shares, tasks)
    until = time_ns() + 50_000
    while (@atomic shares.done) < shares.count
        time_ns() < until || return foreach(wait, tasks)
        GC.safepoint()
    end
    return nothing
end

"Call `f` with each of `items` and its number, on all threads."
share_items(f, items) = share(shares -> foreach(i -> f(i, items[i]), shares), length(items))
