using Flux, PrunableFlux, Random, Test
using PrunableFlux: DenseKernel, PermutedRows, SparseRows, SparseWindows, AVX512, SPAN, multiply!

relative(a, b) = maximum(abs, a .- b; init = 0) / max(maximum(abs, b; init = 0), 1)

"Statistics and parameters of batch normalisation as training might have left them."
function disturb!(rng, model)
    for part in Flux.modules(model)
        part isa BatchNorm || continue
        part.μ .= randn(rng, Float32, part.chs)
        part.σ² .= rand(rng, Float32, part.chs) .+ 0.5f0
        part.γ .= randn(rng, Float32, part.chs)
        part.β .= randn(rng, Float32, part.chs)
    end
    return model
end

networks = [
    "LeNet-5" => ((28, 28, 1), Chain(Conv((5, 5), 1 => 6, relu; pad = 2), MaxPool((2, 2)), Conv((5, 5), 6 => 16, relu),
                                     MaxPool((2, 2)), Flux.flatten, Dense(400 => 120, relu), Dense(120 => 10))),
    "VGG with batch normalisation" => ((11, 9, 3), Chain(
        Conv((3, 3), 3 => 7; pad = 1, bias = false), BatchNorm(7, relu), Chain(Conv((3, 3), 7 => 8, tanh; pad = SamePad())),
        Dropout(0.5), MeanPool((2, 3); stride = (2, 1), pad = (1, 0)), Conv((2, 2), 8 => 5; dilation = 2), BatchNorm(5),
        GlobalMeanPool(), Flux.flatten, Dense(5 => 3))),
    "strides and asymmetric padding" => ((13, 12, 2), Chain(
        Conv((3, 2), 2 => 4, sigmoid; stride = (2, 3), pad = (1, 0, 2, 1)), MaxPool((3, 3); pad = 1, stride = 1),
        AdaptiveMaxPool((3, 2)), Conv((1, 1), 4 => 6, relu), Flux.flatten, BatchNorm(36, tanh), Dense(36 => 4; bias = false))),
    "one dimension" => ((21, 2), Chain(Conv((5,), 2 => 9, relu; stride = 2), Conv((3,), 9 => 4), GlobalMaxPool(), Flux.flatten)),
    "three dimensions" => ((6, 5, 7, 2), Chain(Conv((3, 2, 3), 2 => 4, relu; pad = 1), AdaptiveMeanPool((2, 2, 2)), Flux.flatten,
                                               Dense(32 => 2))),
]

@testset "a sparse network is the masked network: $name" for (name, (size, model)) in networks
    rng = Xoshiro(1)
    model = disturb!(rng, prunable(model))
    prune!(model, RandomSaliency(); sparsity = 0.7, structure = Layerwise())
    for kernels in (:auto, :sparse, :dense)
        fast = sparsify(model; kernels, input_size = size)
        for n in (1, 5, 16, 40, 133)
            x = randn(rng, Float32, size..., n)
            y = Flux.testmode!(model)(x)
            @test relative(fast(x), y) < 1e-5 && relative(fast(reshape(x, :, n)), y) < 1e-5
        end
        @test all(fetch.([Threads.@spawn fast(x) == y for (x, y) in [(x, fast(x)) for x in [randn(rng, Float32, size..., 30)]], _ in 1:8]))
    end
end

@testset "windows far apart and few outputs: $places, $size, stride $stride" for (places, size, stride, channels, outputs) in
        ((28, 3, 4, 1, 2), (28, 7, 7, 1, 1), (64, 16, 16, 1, 8), (64, 16, 16, 3, 2), (30, 1, 5, 1, 1))
    model = prunable(Chain(Conv((size, size), channels => outputs; stride), MaxPool((2, 2); stride = 5), Flux.flatten))
    prune!(model, RandomSaliency(); sparsity = 0.4)
    x = rand(Xoshiro(1), Float32, places, places, channels, 20)
    for kernels in (:auto, :sparse, :dense)
        fast = sparsify(model; kernels, input_size = (places, places, channels))
        @test relative(fast(x), model(x)) < 1e-5 && relative(fast(x[:, :, :, 1:1]), model(x[:, :, :, 1:1])) < 1e-5
        for (; kernel) in fast.single # nothing is written behind what sparsify makes room for
            buffers = [fill(1.0f0, PrunableFlux.buffer_length(kernel) + 5000) for _ in 1:2]
            multiply!(buffers..., kernel)
            @test all(==(1), buffers[1][(end - 4999):end])
        end
    end
end

@testset "pooling by two: $pool over $size" for pool in (MaxPool, MeanPool), size in ((1, 2), (3, 3), (4, 1))
    model = prunable(Chain(Conv((1, 1), 2 => 3), pool(size; stride = 2, pad = size .÷ 2), Flux.flatten))
    x = randn(Xoshiro(1), Float32, 39, 10, 2, 20)
    fast = sparsify(model; input_size = (39, 10, 2))
    @test relative(fast(x), model(x)) < 1e-5 && relative(fast(x[:, :, :, 1:1]), model(x[:, :, :, 1:1])) < 1e-5
end

@testset "sparsify convolutions" begin
    model = prune!(prunable(Chain(Conv((3, 3), 1 => 4, relu), Flux.flatten, Dense(16 => 3))), Magnitude(); sparsity = 0.5)
    fast = sparsify(model; kernels = [:sparse, :dense], input_size = (4, 4, 1))
    @test fast.panels[1].kernel isa SparseWindows && fast.panels[2].kernel isa DenseKernel
    @test repr(fast) == "SparseNetwork(4×4×1 => 2×2×4 => 3; density=0.5)"
    @test_throws "input_size must be given" sparsify(model)
    @test_throws DimensionMismatch sparsify(model; input_size = (4, 4, 2))
    @test_throws DimensionMismatch sparsify(model; input_size = (5, 4, 1))
    @test_throws DimensionMismatch sparsify(model; input_size = (2, 4, 1))
    @test_throws DimensionMismatch sparsify(model; input_size = 16)
    wide = sparsify(model; input_size = (4, 4, 1))
    @test_throws "samples of size (4, 4, 1), not (2, 8, 1)" wide(zeros(Float32, 2, 8, 1, 3))
    @test_throws DimensionMismatch wide(zeros(Float32, 3, 4, 4, 1))
    @test size(wide(zeros(Float32, 4, 4, 1, 0))) == (3, 0) && size(wide(zeros(Float32, 16, 2))) == (3, 2)
    @test_throws ArgumentError sparsify(prunable(Chain(Conv((3, 3), 2 => 2; groups = 2))); input_size = (4, 4, 2))
    @test_throws ArgumentError sparsify(prunable(Chain(BatchNorm(3; track_stats = false), Dense(3 => 2))))
    normed = disturb!(Xoshiro(1), prunable(Chain(BatchNorm(3), Dense(3 => 2, relu), BatchNorm(2, tanh))))
    x = rand(Float32, 3, 20)
    @test sparsify(normed)(x) ≈ Flux.testmode!(normed)(x) && sparsify(normed)(x[:, 1]) ≈ normed(x[:, 1:1])[:, 1]
end

@testset "single samples: $inputs inputs, density $density" for inputs in (1, 15, 16, 17, 64, 65, 300), density in (0, 0.01, 0.1, 0.5, 1)
    rng = Xoshiro(1)
    W, mask, b = randn(rng, Float32, 9, inputs), rand(rng, 9, inputs) .< density, randn(rng, Float32, 9)
    x = fill(NaN32, inputs + SPAN) # behind the end nothing counts
    x[1:inputs] = randn(rng, Float32, inputs)
    y = (W .* mask) * x[1:inputs] .+ b
    for kind in (AVX512 ? (SparseRows, PermutedRows) : (SparseRows,)), relu in (false, true)
        @test relative(multiply!(zeros(Float32, 9), x, kind(W, mask, b, relu)), relu ? max.(y, 0) : y) < 1e-5
    end
end
