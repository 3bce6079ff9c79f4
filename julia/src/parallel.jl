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

"How many hold BLAS, and the threads that it had before."
const HELD = (lock = ReentrantLock(), count = Ref(0), threads = Ref(0))

"""
Where Julia has several threads, leave BLAS one until `release_blas` is called: then `shared_product` shares products among Julia's.
BLAS's own keep processors busy for a tenth of a second after each, waiting for the next, while Julia's have other work.
"""
function hold_blas()
    (; lock, count, threads) = HELD
    @lock lock begin
        if count[] == 0 && Threads.nthreads() > 1
            threads[] = BLAS.get_num_threads()
            BLAS.set_num_threads(1)
        end
        count[] += 1
    end
    return nothing
end

function release_blas()
    (; lock, count, threads) = HELD
    @lock lock begin
        count[] -= 1
        count[] == 0 && Threads.nthreads() > 1 && BLAS.set_num_threads(threads[])
    end
    return nothing
end

"Multiplications of a product, and elements of an update, that take longer than to share fewer."
const SHARED_PRODUCT, SHARED_UPDATE = 2^21, 2^17
const HostMatrix{T} = Union{Matrix{T},Adjoint{T,Matrix{T}}}

"`A * B`, of which each of Julia's threads computes some rows or columns if BLAS has but one thread."
shared_product(A, B) = A * B
shared_product(A::HostMatrix{T}, B::HostMatrix{T}) where {T<:Union{Float32,Float64}} =
    shared_product!(Matrix{T}(undef, size(A, 1), size(B, 2)), A, B)

function shared_product!(C, A, B)
    n, m = size(C)
    Threads.nthreads() > 1 && n * m * size(A, 2) >= SHARED_PRODUCT && BLAS.get_num_threads() == 1 || return mul!(C, A, B)
    share_items(collect(parts(max(n, m)))) do _, part
        n >= m ? gemm!(view(C, part, :), rows(A, part), B) : gemm!(view(C, :, part), A, columns(B, part))
    end
    return C
end

# `mul!` of views takes seconds to compile.
gemm!(C, A, B) = BLAS.gemm!(trans(A), trans(B), one(eltype(C)), stored(A), stored(B), zero(eltype(C)), C)
trans(A) = A isa Adjoint ? 'T' : 'N'
stored(A) = A isa Adjoint ? parent(A) : A

"As many even parts of `1:n` as there are threads."
parts(n) = Iterators.partition(1:n, cld(n, Threads.nthreads()))
rows(A::Matrix, part) = view(A, part, :)
rows(A::Adjoint, part) = columns(parent(A), part)'
columns(A::Matrix, part) = view(A, :, part)
columns(A::Adjoint, part) = rows(parent(A), part)'
