using Flux, LinearAlgebra, PrunableFlux, Random, Test
using PrunableFlux: HELD, hold_blas, release_blas, share, share_items, shared_product

@testset "threads share work" begin
    for n in (0, 1, 2, 3, 100)
        times = zeros(Int, n)
        share_items((i, item) -> (times[i] += item), fill(1, n))
        @test times == ones(n)
    end
    for wrong in (1, 7, 10) # on whichever thread
        done = zeros(Int, 10)
        @test_throws "number $wrong" try
            share(10) do shares
                for i in shares
                    i == wrong ? error("number $i") : (done[i] += 1; yield())
                end
            end
        catch error
            rethrow(error isa TaskFailedException ? error.task.result : error)
        end
        @test all(<=(1), done) && done[wrong] == 0
    end
end

@testset "threads share matrix products" begin
    rng, before = Xoshiro(1), BLAS.get_num_threads()
    @test Threads.nthreads() > 1
    sizes = ((301, 785, 63), (63, 500, 301), (1024, 64, 1), (1, 1, 1), (0, 3, 2))
    for T in (Float32, Float64), (n, k, m) in sizes, threads in (1, 2)
        BLAS.set_num_threads(threads)
        A, B = randn(rng, T, n, k), randn(rng, T, k, m)
        for a in (A, copy(A')'), b in (B, copy(B')')
            @test shared_product(a, b) ≈ A * B && shared_product(a, b) isa Matrix{T}
        end
    end
    @test_throws DimensionMismatch shared_product(zeros(Float32, 300, 700), zeros(Float32, 701, 64))
    BLAS.set_num_threads(2)
    hold_blas()
    hold_blas()
    @test BLAS.get_num_threads() == 1
    release_blas()
    @test BLAS.get_num_threads() == 1
    release_blas()
    @test BLAS.get_num_threads() == 2
    model, x, y = prunable(Chain(Dense(4 => 3))), rand(Float32, 4, 2), Flux.onehotbatch(1:2, 1:3)
    loss(ŷ, y) = BLAS.get_num_threads() == 1 ? error("in a step") : 0
    @test_throws "in a step" train_masked!(loss, model, [(x, y)], Flux.setup(Adam(), model))
    @test_throws "in a step" evaluate(model, (x, y); loss)
    @test BLAS.get_num_threads() == 2 && HELD.count[] == 0
    BLAS.set_num_threads(before)
end
