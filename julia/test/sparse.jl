using Flux, PrunableFlux, Random, Test
using PrunableFlux: DenseKernel, SparseKernel

relative(a, b) = maximum(abs, a .- b; init = 0) / max(maximum(abs, b; init = 0), 1)

@testset "a sparse network is the masked network: trial $trial" for trial in 1:30
    rng = Xoshiro(trial)
    widths = rand(rng, (1, 3, 16, 17, 64, 130, 300), rand(rng, 2:5))
    model = mlp(rng, widths...; σ = rand(rng, (relu, tanh, sigmoid, identity)))
    trial % 3 == 0 && (model = Chain(PrunableDense(Dense(randn(rng, Float32, widths[1], 5), false)), model, identity))
    foreach(layer -> layer.dense.weight ./= sqrt(size(layer.mask, 2)), prunables(model)) # so that sums stay of order 1
    prune!(model, RandomSaliency(seed = trial); sparsity = rand(rng, (0, 0.5, 0.9, 0.99)))
    for kernels in (:auto, :sparse, :dense)
        fast = sparsify(model; kernels)
        for n in (0, 1, 2, 16, 33, 64, 65, 200)
            x = randn(rng, Float32, size(first(prunables(model)), 2), n)
            @test relative(fast(x), model(x)) < 1e-5
            n == 1 && @test relative(fast(vec(x)), model(vec(x))) < 1e-5
        end
    end
end

@testset "sparsify" begin
    rng = Xoshiro(1)
    model = prune!(mlp(rng, 40, 30, 20, 5), Magnitude(); sparsity = 0.8)
    x = randn(rng, Float32, 40, 300)
    fast = sparsify(model; kernels = [:dense, :sparse, :auto])
    @test fast.layers[1].panels isa DenseKernel && fast.layers[2].panels isa SparseKernel
    @test repr(fast) == "SparseNetwork(40 => 30 => 20 => 5; density=0.2)"
    y = fast(x)
    @test y ≈ model(x) && y ≈ fast(Float64.(x)) && y ≈ fast(view(x, :, 1:300)) && y ≈ fast(reshape(x, 8, 5, 300))
    @test all(fetch.([Threads.@spawn fast(x) == y for _ in 1:20]))
    foreach(layer -> layer.dense.weight .= 0, model)
    @test fast(x) == y
    @test_throws DimensionMismatch fast(x[1:39, :])
    @test_throws ArgumentError sparsify(model; kernels = :fast)
    @test_throws ArgumentError sparsify(model; kernels = [:sparse])
    @test_throws ArgumentError sparsify(prunable(Chain(Conv((3, 3), 1 => 2), Flux.flatten, Dense(2 => 2))))
    @test_throws ArgumentError sparsify(Chain(relu))
    empty = sparsify(mask!(Chain(PrunableDense(Dense(randn(rng, Float32, 3, 4), ones(Float32, 3)), falses(3, 4)))))
    @test empty(randn(rng, Float32, 4, 2)) == ones(3, 2)
end
